"""Models on the Hugging Face Hub, through huggingface_hub's mixin; an optional part, ``pip install fastcm[hub]``."""

from pathlib import Path
from typing import Self

import torch

from fastcm.errors import CheckpointError, ConfigError
from fastcm.integrations.hub_layout import CONFIG_FILE, WEIGHTS_FILE, model_card, model_of_bundle, read_hub, write_hub
from fastcm.io.bundle import BundleHeader
from fastcm.model import Model

try:
    from huggingface_hub import ModelCard, ModelHubMixin, hf_hub_download
except ImportError as error:
    raise ConfigError(
        f"HubModel needs the package huggingface_hub: pip install fastcm[hub] ({error}); without it, export_hub and "
        "import_hub write and read the same folders"
    ) from error


class HubModel(Model, ModelHubMixin):
    """A model that can be saved to and loaded from the Hugging Face Hub or a folder of its layout, without any pickle.

    ``save_pretrained(folder)`` and ``push_to_hub(repo_id)`` are huggingface_hub's. Arguments: a model, whose network is
    shared, and the header of a bundle of it.
    """

    def __init__(self, model: Model, header: BundleHeader) -> None:
        options = (model.label_dim, model.dtype, model.sampling, model.trajectory)
        super().__init__(model.net, model.precond, model.image_shape, *options)
        self.header = header

    @classmethod
    def from_bundle(cls, path: str | Path, *, ema: str = "") -> Self:
        """The model in a bundle or run folder; ``ema`` chooses the weights as in ``fastcm.load``."""
        return cls(*model_of_bundle(path, ema)).eval()

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        force_download: bool = False,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        revision: str | None = None,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> Self:
        """The model in a folder or, where there is no such folder, in a repository of the Hub.

        The arguments are huggingface_hub's, and ``device`` and ``dtype`` as in ``fastcm.load``. Raises CheckpointError
        naming the file, and the key that is missing, unknown or damaged, or saying why nothing could be downloaded.
        """
        folder = Path(pretrained_model_name_or_path)
        if folder.is_dir():
            config, weights = folder / CONFIG_FILE, folder / WEIGHTS_FILE
        else:
            options = {
                "force_download": force_download,
                "token": token,
                "cache_dir": cache_dir,
                "local_files_only": local_files_only,
                "revision": revision,
            }
            config, weights = (_download(str(folder), name, **options) for name in (CONFIG_FILE, WEIGHTS_FILE))
        return cls(*read_hub(config, weights, dtype)).to(device).eval()

    def generate_model_card(self, *args: object, **kwargs: object) -> ModelCard:
        """The card that ``save_pretrained`` writes where there is none; the arguments, of a template, have no effect."""
        return ModelCard(model_card(self.header))

    def _save_pretrained(self, save_directory: Path) -> None:
        write_hub(self, self.header, save_directory)


def _download(repo_id: str, name: str, **options: str | Path | bool | None) -> Path:
    """A file of a repository, from the cache where it is there already."""
    try:
        return Path(hf_hub_download(repo_id, name, **options))
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{repo_id}: no such folder, and {name} could not be fetched from the Hub: {reason}") from error
