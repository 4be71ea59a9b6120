"""dream_sft.py for code: soft-masking added to Dream-Coder-7B by DoRA on the responses of Ling-Coder-SFT.

python -m smdlm.convert import decoder Dream-Coder-v0-Instruct-7B runs/dream_coder
python -m smdlm.main --config=configs/dream_coder_sft.py --config.data.source='chat:Ling-Coder-SFT/*.parquet'

Sizes and settings are those of dream_sft.py, which also says what is needed. Not run here at full length.
"""

import ml_collections

from configs import dream_sft


def get_config() -> ml_collections.ConfigDict:
    config = dream_sft.get_config()
    config.data.tokenizer = "hf:Dream-Coder-v0-Instruct-7B"
    config.train.init_from = "runs/dream_coder"
    return config
