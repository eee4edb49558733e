"""Write what LoRA has learned as an adapter for PEFT, in the layout of the base model at Hugging
Face: adapter_config.json and adapter_model.safetensors."""
import json

from configurator import GPTConfig
from lib.errors import require
from lib.files import command, find, write_synced
from lib.huggingface import HUB
from lib.write_huggingface import choose_layout, split_like, write_safetensors


def write_adapter(checkpoint, folder, dtype):
    """Write the adapter of a Checkpoint into a folder, in dtype. Returns the name of the base model
    as PEFT will look for it. Raises UserError."""
    require(checkpoint.lora, f'{checkpoint.path} has no adapter: only a checkpoint of a run with '
                             f'--lora_rank has one, and no mean of several')
    config, trained = GPTConfig(**checkpoint.model_config), checkpoint.config
    _, layout = choose_layout(config)
    tensors, targets = {}, set()
    for ours, theirs in layout.layers(config.n_layer):
        if f'{ours}.lora_A' in checkpoint.lora:
            A, B = (checkpoint.lora[f'{ours}.lora_{name}'].to(dtype) for name in 'AB')
            for name, rows in split_like(theirs, config, B):  # rows of B: q, k, v share our A
                tensors[f'base_model.model.{name}.lora_A.weight'] = A
                tensors[f'base_model.model.{name}.lora_B.weight'] = rows
                targets.add(name.rpartition('.')[2])
    base = HUB.get(trained['init_from'], trained['init_from'])
    run = find(base).resolve()
    of_run = run.is_dir() and not (run / 'config.json').exists()
    if of_run:  # PEFT needs its export
        base = str(run / 'hf')
    saved = {'peft_type': 'LORA', 'task_type': 'CAUSAL_LM', 'r': trained['lora_rank'],
             'lora_alpha': trained['lora_alpha'], 'lora_dropout': trained['lora_dropout'],
             'target_modules': sorted(targets), 'fan_in_fan_out': layout.conv1d, 'bias': 'none',
             'base_model_name_or_path': base, 'inference_mode': True}
    write_safetensors(folder / 'adapter_model.safetensors', tensors)
    write_synced(folder / 'adapter_config.json', json.dumps(saved, indent=2))
    return base + f', which {command("tools/export.py", out_dir=run)} writes' * of_run
