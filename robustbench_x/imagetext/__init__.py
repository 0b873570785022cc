"""Image-text models: what an attack on the image does to retrieval and to captions, measured against texts."""
