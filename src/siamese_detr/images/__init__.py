"""Where pictures and labels come from, and what is wrong with them."""

from siamese_detr.images.decode import read_image, read_size
from siamese_detr.images.labels import DetectionDataset, LabelledImage, read_labels
from siamese_detr.images.listing import ImageList, list_images

__all__ = [
    "DetectionDataset",
    "ImageList",
    "LabelledImage",
    "list_images",
    "read_image",
    "read_labels",
    "read_size",
]
