"""Image sets: scikit-learn's digits, generated ones, and those of the TFDS catalogue, as arrays in memory."""

from sparsezoo_jax.data.images import digits, moving, shapes, textures
from sparsezoo_jax.data.images.image_set import IMAGE_SETS, ImageSet, open_images, register_images

__all__ = ["IMAGE_SETS", "ImageSet", "digits", "moving", "open_images", "register_images", "shapes", "textures"]
