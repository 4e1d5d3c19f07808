"""Load the quickstart's model in a fresh process, as anybody would: transformers and peft, nothing of fedex_hf.

    python recipes/quickstart_reload.py MODEL_DIR REFERENCE.safetensors [DEVICE]

The reference holds one batch of model inputs and the logits that the trainer's model gave for it. Exits with status 1
if any logit differs in any bit.
"""

import sys
import warnings

import torch
from peft import AutoPeftModelForSequenceClassification
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, logging


def main(model_dir: str, reference: str, device: str = "cpu") -> int:
    """Print one line per way to load; return the exit status."""
    logging.disable_progress_bar()
    # Base and adapter lie in one folder: transformers loads both, then PEFT says that it finds the adapter in place.
    warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute")
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")  # peft 0.21 asks for it
    inputs = load_file(reference, device=device)
    expected = inputs.pop("logits")
    status = 0
    for auto_class in (AutoModelForSequenceClassification, AutoPeftModelForSequenceClassification):
        model = auto_class.from_pretrained(model_dir).to(device).eval()
        with torch.no_grad():
            logits = model(**inputs).logits
        same = torch.equal(logits, expected)
        verdict = "bit-equal" if same else f"NOT equal, largest difference {(logits - expected).abs().max():.2e}"
        print(f"{auto_class.__name__ + '.from_pretrained':<55} logits {tuple(logits.shape)}: {verdict}")
        status |= not same
    if "fedex_hf" in sys.modules:
        print("fedex_hf was imported: this shows nothing.")
        status = 1
    return int(status)


if __name__ == "__main__":
    if len(sys.argv) not in (3, 4):
        raise SystemExit(__doc__)
    raise SystemExit(main(*sys.argv[1:]))
