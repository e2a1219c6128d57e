"""Package carproto from settings.ini, the one place for name, version, dependencies and extras."""
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
parser = ConfigParser(delimiters=["="], interpolation=None)
parser.read(here / "settings.ini", encoding="utf-8")
settings = parser["DEFAULT"]

kinds = [key.removesuffix("_requirements") for key in settings if key.endswith("_requirements")]
extras = {kind: settings[f"{kind}_requirements"].split() for kind in kinds}
extras["all"] = sorted({package for name, packages in extras.items() if name != "dev" for package in packages})

setup(
    name=settings["lib_name"],
    version=settings["version"],
    description=settings["description"],
    long_description=(here / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author=settings["author"],
    author_email=settings["author_email"],
    license="Apache-2.0",
    url=settings["git_url"],
    keywords=settings["keywords"],
    packages=find_packages(include=["carproto", "carproto.*"]),
    package_data={"carproto.app": ["live/*"]},  # the files of the live page
    python_requires=f">={settings['min_python']}",
    install_requires=settings["requirements"].split(),
    extras_require=extras,
    entry_points={
        "console_scripts": settings["console_scripts"].split(),
        "nbdev": [f"{settings['lib_name']}={settings['lib_name']}._modidx:d"],
    },
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "License :: OSI Approved :: Apache Software License",
        *(f"Programming Language :: Python :: 3.{minor}" for minor in range(10, 14)),
    ],
    zip_safe=False,
)
