"""What the latents of a few SAEs are: which tokens drive them, and a page for rating them blind."""
