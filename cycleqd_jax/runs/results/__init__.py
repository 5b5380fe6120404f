"""What a search ends with: chosen models, their table, and folders to hand on."""
