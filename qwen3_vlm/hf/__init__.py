"""The model as transformers users get it; shipped beside exported weights. Imports torch and transformers alone."""
