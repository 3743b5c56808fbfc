"""The message for an unknown key: the setting of another trainer's name, or the nearest one."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

_ROLES: dict[tuple[str, ...], str] = {
    # our keys, the likeliest first -> names in TRL, Megatron-LM, axolotl, DeepSpeed, OpenRLHF
    ("train.global_batch_size", "ppo.batch_size"): """
        batch_size train_batch_size total_batch_size effective_batch_size gbs
        gradient_accumulation_steps gradient_accumulation grad_accum accumulate_grad_batches""",
    ("train.micro_batch_size",): """
        per_device_train_batch_size per_device_eval_batch_size per_gpu_batch_size mbs
        micro_train_batch_size micro_batch train_micro_batch_size_per_gpu device_batch_size""",
    ("optimizer.lr", "ppo.value_lr"): """
        learning_rate max_lr peak_lr actor_learning_rate policy_lr base_lr""",
    ("ppo.value_lr",): "critic_learning_rate critic_lr value_learning_rate vf_lr",
    ("schedule.min_lr_ratio",): "min_lr final_lr lr_min",
    ("schedule.decay",): "lr_scheduler_type lr_scheduler lr_decay_style scheduler",
    ("schedule.warmup_steps",): """
        warmup lr_warmup_iters num_warmup_steps lr_warmup_steps warmup_iters warmup_ratio
        lr_warmup_fraction lr_warmup_samples""",
    ("schedule.warmup_start",): "lr_warmup_init",
    ("optimizer.beta1",): "adam_beta1",
    ("optimizer.beta2",): "adam_beta2",
    ("optimizer.eps",): "adam_epsilon adam_eps epsilon",
    ("optimizer.weight_decay",): "wd l2",
    ("optimizer.clip_grad",): """
        max_grad_norm gradient_clipping gradient_clip_val grad_clip grad_norm""",
    ("optimizer.distributed",): "use_distributed_optimizer zero zero_stage",
    ("optimizer.initial_loss_scale",): "loss_scale initial_scale_power",
    ("train.steps",): """
        max_steps train_iters num_steps total_steps total_iterations max_iters iterations
        num_iterations total_episodes num_episodes train_samples""",
    ("train.epochs",): "num_train_epochs num_epochs max_epochs n_epochs epoch",
    ("ppo.inner_epochs",): "num_ppo_epochs ppo_epochs noptepochs update_epochs",
    ("ppo.minibatch_size",): "mini_batch_size ppo_mini_batch_size num_mini_batches",
    ("ppo.kl_coef",): "beta kl_penalty init_kl_coef kl_coefficient kl_beta kl_loss_coef",
    ("ppo.adaptive_kl_target",): "target kl_target",
    ("ppo.adaptive_kl_horizon",): "horizon kl_horizon",
    ("ppo.clip",): "cliprange clip_range eps_clip clip_ratio cliprange_policy",
    ("ppo.value_clip",): "cliprange_value value_cliprange vf_clip",
    ("ppo.gamma_ptx",): "ptx_coef pretrain_coef",
    ("ppo.lam",): "lambda lambd gae_lambda",
    ("ppo.no_stop_penalty",): "missing_eos_penalty non_eos_penalty",
    ("ppo.reward_model",): "reward_model_path reward_pretrain reward_model_name_or_path rm",
    ("ppo.reward_function",): "reward_funcs reward_fn reward_func remote_rm_url",
    ("ppo.value_model",): "critic_pretrain value_model_path critic_model",
    ("ppo.entropy_coef",): "ent_coef entropy_loss_coef vf_entropy",
    ("ppo.ema_decay",): "ema_beta ema",
    ("train.seed",): "random_seed data_seed manual_seed",
    ("train.eval_interval",): "eval_steps evaluation_interval eval_every eval_freq",
    ("train.eval_batches",): "eval_iters max_eval_batches limit_val_batches",
    ("train.max_seconds",): "exit_duration_in_mins max_time time_limit",
    ("train.max_tokens_per_micro_batch",): "max_tokens_per_gpu token_budget",
    ("generation.max_new_tokens", "train.max_tokens_per_micro_batch"): "max_tokens",
    ("parallel.tensor",): """
        tp tp_size tensor_parallel tensor_parallel_size tensor_model_parallel_size tensor_parallelism""",
    ("parallel.pipeline",): """
        pp pp_size pipeline_parallel pipeline_parallel_size pipeline_model_parallel_size""",
    ("parallel.context",): "cp cp_size context_parallel context_parallel_size",
    ("parallel.sequence",): "sp sequence_parallel",
    ("parallel.timeout_s",): "distributed_timeout_minutes ddp_timeout timeout",
    ("model.num_layers",): "n_layer n_layers num_hidden_layers",
    ("model.hidden_size",): "n_embd d_model dim hidden_dim",
    ("model.num_heads",): "n_head n_heads num_attention_heads",
    ("model.num_kv_heads",): "num_key_value_heads num_query_groups n_kv_heads",
    ("model.head_dim",): "kv_channels",
    ("model.ffn_size",): "intermediate_size ffn_hidden_size n_inner d_ff",
    ("model.max_positions",): "max_position_embeddings n_positions n_ctx context_length",
    ("model.vocab_size",): "padded_vocab_size n_vocab",
    ("model.rope_theta",): "rotary_base rope_base",
    ("model.rope_scaling",): "rope_type rope_scaling_type use_rope_scaling rope_parameters",
    ("model.rope_factor",): "rope_scaling_factor",
    ("model.rope_original_positions",): "original_max_position_embeddings",
    ("model.sliding_window",): "sliding_window_size window_size use_sliding_window",
    ("model.full_attention_layers",): "max_window_layers",
    ("model.norm_eps",): "layernorm_epsilon rms_norm_eps layer_norm_eps layer_norm_epsilon",
    ("model.tie_embeddings",): "tie_word_embeddings untie_embeddings_and_output_weights",
    ("model.residual_dropout",): "dropout hidden_dropout resid_pdrop",
    ("model.init_std",): "init_method_std initializer_range",
    ("model.dtype",): "bf16 fp16 torch_dtype precision mixed_precision params_dtype",
    ("model.recompute",): """
        gradient_checkpointing activation_checkpointing recompute_granularity""",
    ("model.recompute_layers",): "recompute_num_layers",
    ("model.attention",): "attn_implementation flash_attn flash_attention use_flash_attn",
    ("model.hf", "model.load"): """
        base_model model_name_or_path model_name pretrained model_path checkpoint_path
        load_checkpoint""",
    ("data.tokenizer",): "tokenizer_path tokenizer_name tokenizer_model tokenizer_name_or_path",
    ("data.train",): "datasets dataset dataset_name data_path train_file train_data train_files",
    ("data.valid",): "eval_dataset validation_file val_file test_datasets valid_data_path val",
    ("data.prompts",): "prompt_data prompt_dataset query_dataset",
    ("data.sequence_length", "model.max_positions"): """
        seq_length sequence_len seq_len max_seq_length max_seq_len max_length block_size""",
    ("data.max_prompt_tokens",): "max_prompt_length prompt_max_len query_length",
    ("data.max_response_tokens",): "max_response_length max_completion_length",
    ("data.cache",): "dataset_prepared_path data_cache_path",
    ("data.loss_on",): "train_on_inputs assistant_only_loss completion_only_loss",
    ("generation.max_new_tokens",): """
        response_length generate_max_len max_tokens_to_generate max_generated_tokens""",
    ("generation.stop",): "stop_token stop_strings stop_words stop_sequences",
    ("generation.slots",): "max_num_seqs max_batch_size rollout_batch_size",
    ("sample.k",): "num_return_sequences n_samples_per_prompt num_generations n_samples",
    ("checkpoint.interval",): "save_steps save_interval save_every saves_per_epoch",
    ("checkpoint.keep_last",): "save_total_limit max_to_keep",
    ("checkpoint.resume",): "resume_from_checkpoint auto_resume",
    ("checkpoint.asynchronous",): "async_save",
    ("checkpoint.keep_best",): "load_best_model_at_end metric_for_best_model",
    ("log.interval",): "logging_steps log_interval log_every",
    ("log.wandb_project",): "wandb report_to wandb_name",
    ("log.tensorboard",): "tensorboard_dir use_tensorboard",
    ("output_dir",): "save_path out_dir save_dir out output logging_dir checkpoint_dir",
}

ALIASES: dict[str, tuple[str, ...]] = {
    name: keys for keys, names in _ROLES.items() for name in names.split()
}
"""Name in other trainers -> our keys for it."""

_NOTES = {
    **dict.fromkeys(
        ("gradient_accumulation_steps", "gradient_accumulation", "grad_accum"),
        "steps accumulate global_batch_size / (micro_batch_size x data-parallel size) micro-batches",
    ),
    "accumulate_grad_batches": "it follows from the global and the micro-batch size",
    "warmup_ratio": "in steps, not as a share",
    "lr_warmup_fraction": "in steps, not as a share",
    "lr_warmup_samples": "in steps, not in samples",
    "train_samples": "in steps, not in samples",
    "total_episodes": "episodes / ppo.batch_size",
    "num_episodes": "episodes / ppo.batch_size",
    "min_lr": "as a fraction of optimizer.lr",
    "final_lr": "as a fraction of optimizer.lr",
    "lr_min": "as a fraction of optimizer.lr",
    "distributed_timeout_minutes": "in seconds",
    "exit_duration_in_mins": "in seconds",
    "num_mini_batches": "the size of one, not their number",
    "initial_scale_power": "the scale, not its exponent",
    "untie_embeddings_and_output_weights": "the opposite",
    "bf16": "model.dtype=bf16",
    "fp16": "model.dtype=fp16",
}
"""Names whose values mean something else here -> the difference."""
_WITHOUT_KEY = {
    **dict.fromkeys(
        ("dp", "dp_size", "data_parallel", "data_parallel_size", "num_gpus", "world_size"),
        "data parallelism is the number of processes / (parallel.tensor x parallel.pipeline)",
    ),
    **dict.fromkeys(
        ("num_processes", "nproc_per_node", "num_nodes", "nnodes", "n_gpus_per_node"),
        "torchrun sets the number of processes",
    ),
    **dict.fromkeys(
        ("lora", "lora_r", "lora_alpha", "lora_rank", "use_peft", "adapter", "load_in_4bit"),
        "all weights are trained; LoRA and quantization are not supported",
    ),
}
"""Names of what no key sets here -> what does."""


def unknown_key(key: str, keys: Sequence[str]) -> str:
    """Return the message for a key that is not one of `keys` (dotted), with the likeliest one."""
    parent, _, name = key.rpartition(".")
    name = name.lower().replace("-", "_")
    shown = shorten(key, 100)
    if near := suggestion(key, keys):
        return f"unknown key {shown}; did you mean {near}"
    if name in _WITHOUT_KEY and "parallel.tensor" in keys:
        return f"unknown key {shown}; {_WITHOUT_KEY[name]}"
    siblings = [k for k in keys if k.rpartition(".")[0] == parent]
    owner, known = (
        (f" of {parent}", [k.rpartition(".")[2] for k in siblings])
        if parent and siblings
        else ("", [k for k in keys if "." not in k])
    )
    return f"unknown key {shown}; the keys{owner} are {', '.join(known)}"


def suggestion(key: str, keys: Sequence[str]) -> str:
    """Return the question's end, such as "train.seed?", or "" if no key is near.

    First the keys of another trainer's name, then the same name in another section, then
    the nearest name of the section, then the nearest of any section.
    """
    parent, _, name = key.rpartition(".")
    name = name.lower().replace("-", "_")[:100]
    aliases = [k for k in ALIASES.get(name, ()) if k in keys]
    aliases.sort(key=lambda k: k.rpartition(".")[0] != parent)
    if aliases:
        note = f" ({_NOTES[name]})" if name in _NOTES else ""
        return f"{' or '.join(aliases)}?{note}"
    siblings = _by_name(k for k in keys if k.rpartition(".")[0] == parent)
    settings = _by_name(k for k in keys if "." in k)
    if name in settings:
        return f"{settings[name]}?"
    nearest = [siblings[near] for near in difflib.get_close_matches(name, siblings, n=1)]
    nearest += [
        settings[near] for near in difflib.get_close_matches(name, settings, n=1, cutoff=0.75)
    ]
    return f"{nearest[0]}?" if nearest else ""


def shorten(text: str, limit: int = 160) -> str:
    """Return `text` with control characters escaped, cut to `limit` characters."""
    text = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text[: limit + 1])
    return text if len(text) <= limit else text[: limit - 3] + "..."


def _by_name(keys: Iterable[str]) -> dict[str, str]:
    return {key.rpartition(".")[2]: key for key in keys}
