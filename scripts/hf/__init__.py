"""Export to Hugging Face's transformers: the model code that an exported folder carries, and the folder's writer."""
