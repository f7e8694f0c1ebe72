"""Upload to the Hugging Face Hub."""
