"""What is given to others: wheels and a folder for Hugging Face's `kernels`."""
