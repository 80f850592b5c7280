"""What Gorgon's processes say to each other: errors, checkpoint manifests, generation results. Needs pydantic only."""
