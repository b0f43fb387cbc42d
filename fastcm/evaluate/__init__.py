"""How good the images are: distances between sets of images."""
