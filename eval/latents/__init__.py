"""What the latents of a few SAEs are: where they look, and a page on which a reader rates them blindly."""
