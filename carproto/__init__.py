"""Train SN-GANs on cars, invert photos, and blend common cars with futuristic ones.

The public names are imported when they are first used, so that `import carproto` costs nothing.
"""
__version__ = "0.1.0"

_HOME = {
    "ToyCars": "toycars.dataset",
    "CarImages": "data.dataset",
    "open_cars": "data.dataset",
    "align_cars": "data.frames",
    "curate": "data.curate",
    "crawl_car_connection": "scrape.catalogue",
    "search_images": "scrape.image_search",
    "Generator": "gan.sngan",
    "Discriminator": "gan.sngan",
    "TrainConfig": "config",
    "train_gan": "gan.train",
    "finetune_freezed": "gan.finetune",
    "LatentEncoder": "latent.encoder",
    "train_encoder": "latent.train_encoder",
    "invert": "latent.invert",
    "blend_latents": "blend.interpolate",
    "blend_generators": "blend.interpolate",
    "blend_frames": "blend.interpolate",
    "CarPipeline": "app.body",  # from app.pipeline, with `edit`
    "IntensityStudio": "app.studio",
}
__all__ = [*_HOME]


def __getattr__(name: str):
    """Import a public name from its module (PEP 562)."""
    if name not in _HOME:
        raise AttributeError(f"module 'carproto' has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(f"carproto.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """List the public names beside what is loaded."""
    return sorted({*globals(), *_HOME})
