"""From image files to batches: formats, order, augmentation."""

from fastcm.data.batch import Batch
from fastcm.data.dataset import ResidentDataset, load_resident
from fastcm.data.loader import Loader
from fastcm.data.sources import Source, open_source

__all__ = ["Batch", "Loader", "ResidentDataset", "Source", "load_resident", "open_source"]
