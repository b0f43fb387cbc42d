"""Files: safetensors bundles, EDM weight names, pictures, writes that are whole or not at all."""
