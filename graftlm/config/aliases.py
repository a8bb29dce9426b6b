"""What PEFT, TRL, transformers, LLaMA-Factory and Axolotl call the keys of a recipe: an unknown key that is one of
these gets our key for an answer. A value is a recipe's key, or a sentence where the answer is no single key.

All fields of transformers' TrainingArguments (5.24), TRL's SFTConfig, DPOConfig, KTOConfig and GRPOConfig (1.16) and
PEFT's LoraConfig (0.21) are here, but for those that a recipe calls the same.
"""

from collections.abc import Mapping

_WHOLE_STEP = "train.batch_rows, the rows of a whole step; train.pack_tokens says how much is computed at once"
_OPTIMIZER = "optimizer, by its name here"
_CLI = "no key: graft train"


def _all(names: str, answer: str) -> dict[str, str]:
    """Several names, separated by spaces, with one answer."""
    return dict.fromkeys(names.split(), answer)


OTHER_NAMES: Mapping[str, str] = {
    # the base
    "base_model": "base.name",
    "model": "base.name",
    "model_name": "base.name",
    "model_name_or_path": "base.name",
    "pretrained_model_name_or_path": "base.name",
    "model_id": "base.name",
    "torch_dtype": "base.dtype",
    "bf16": "base.dtype",
    "fp16": "base.dtype",
    "precision": "base.dtype",
    "quantization_bit": "base.quantization",
    "quantization_config": "base.quantization",
    "bnb_4bit_quant_type": "base.quantization (nf4)",
    "load_in_4bit": "base.quantization (nf4 or int4)",
    "load_in_8bit": "base.quantization (int8)",
    "model_revision": "base.revision",
    "trust_remote_code": "base.run_code_shipped_with_the_model",
    "chat_template": "base.template",
    "chat_template_path": "base.template",
    "chat_template_kwargs": "data.template_variables",
    "enable_thinking": "data.template_variables, with its key enable_thinking",
    "reasoning_effort": "data.template_variables, with its key reasoning_effort",
    "base_model_name_or_path": "base.name",
    "model_init_kwargs": "base, with its keys dtype and revision",
    # rows
    "dataset": "data.train",
    "datasets": "data.train",
    "dataset_name": "data.train",
    "dataset_path": "data.train",
    "train_dataset": "data.train",
    "train_file": "data.train",
    "data_files": "data.train",
    "data_path": "data.train",
    "eval_dataset": "data.held_out",
    "eval_file": "data.held_out",
    "test_size": "data.held_out",
    "val_size": "data.held_out",
    "val_set_size": "data.held_out",
    "validation_split": "data.held_out",
    "max_length": "data.max_tokens",
    "max_len": "data.max_tokens",
    "max_seq_len": "data.max_tokens",
    "max_seq_length": "data.max_tokens",
    "max_prompt_length": "data.max_tokens",
    "model_max_length": "data.max_tokens",
    "sequence_len": "data.max_tokens",
    "seq_length": "data.max_tokens",
    "cutoff_len": "data.max_tokens",
    "block_size": "data.max_tokens",
    "truncation": "data.over_length",
    "packing": "data.pack",
    "sample_packing": "data.pack",
    "packing_strategy": "data.pack",
    "padding_free": "data.pack",
    "train_on_inputs": "data.mask",
    "train_on_prompt": "data.mask",
    "assistant_only_loss": "data.mask",
    "completion_only_loss": "data.mask",
    "prompt_loss_weight": "data.prompt_weight",
    "max_samples": "data.train, with its key cap",
    "truncation_mode": "data.over_length; a row is cut at its end",
    "dataset_text_field": "data.train, with its key format: text; the field is called text",
    "train_sampling_strategy": "data.order; without it every epoch is shuffled",
    "shuffle_dataset": "data.order; without it every epoch is shuffled",
    "length_column_name": "data.order (by: length)",
    "interleave_probs": "data.train, with its key weight",
    # the delta
    "adapter": "delta.method",
    "peft_type": "delta.method",
    "finetuning_type": "delta.method",
    "peft": "delta.method",
    "lora": "delta.method",
    "rank": "delta.r",
    "lora_r": "delta.r",
    "lora_rank": "delta.r",
    "lora_alpha": "delta.alpha",
    "lora_dropout": "delta.dropout",
    "target_modules": "delta.targets",
    "lora_target": "delta.targets",
    "lora_target_modules": "delta.targets",
    "lora_modules": "delta.targets",
    "rank_pattern": "delta.patterns",
    "alpha_pattern": "delta.patterns",
    "init_lora_weights": "delta.init",
    "use_rslora": "delta.rslora",
    "layers_to_transform": "delta.targets, a regular expression for whole names",
    "layers_pattern": "delta.targets, a regular expression for whole names",
    "exclude_modules": "delta.targets, a regular expression for whole names",
    "target_parameters": "no key: no delta reaches experts that a model keeps in one tensor",
    "modules_to_save": "deltas, where a second delta with method: full trains whole modules",
    "trainable_token_indices": "deltas, where a second delta with method: trainable-tokens trains rows of embeddings",
    "bias": "deltas, where a second delta with method: bitfit trains biases",
    "loftq_config": "delta.init (loftq)",
    "eva_config": "delta.init (eva)",
    "corda_config": "delta.init (corda)",
    "lora_ga_config": "delta.init (lora-ga)",
    "kasa_config": "delta.method (kasa)",
    "use_qalora": "delta.method (qa-lora)",
    "qalora_group_size": "delta.method (qa-lora)",
    "velora_config": "callbacks (velora)",
    "use_dora": "delta.method (dora)",
    "lora_use_dora": "delta.method (dora)",
    # training
    "lr": "train.learning_rate",
    "lr_scheduler": "train.schedule",
    "lr_scheduler_type": "train.schedule",
    "lr_scheduler_kwargs": "train.decay, the share of the steps over which warmup-stable-decay falls",
    "scheduler": "train.schedule",
    "optim": _OPTIMIZER,
    "optim_args": _OPTIMIZER,
    "optim_target_modules": "optimizer (galore), for all matrices that are trained",
    "max_lr": "train.learning_rate",
    "peak_lr": "train.learning_rate",
    "num_train_epochs": "train.epochs",
    "num_epochs": "train.epochs",
    "n_epochs": "train.epochs",
    "epoch": "train.epochs",
    "max_steps": "train.steps",
    "num_steps": "train.steps",
    "total_steps": "train.steps",
    "max_iters": "train.steps",
    "batch_size": "train.batch_rows",
    "global_batch_size": "train.batch_rows",
    "train_batch_size": "train.batch_rows",
    "per_device_train_batch_size": "train.batch_rows",
    "micro_batch_size": _WHOLE_STEP,
    "gradient_accumulation_steps": _WHOLE_STEP,
    "gradient_accumulation": _WHOLE_STEP,
    "warmup_ratio": "train.warmup",
    "warmup_steps": "train.warmup, a share of the steps",
    "max_grad_norm": "train.clip",
    "grad_clip": "train.clip",
    "gradient_clipping": "train.clip",
    "gradient_clip_val": "train.clip",
    "gradient_checkpointing": "train.checkpointing",
    "gradient_checkpointing_kwargs": "train.checkpointing",
    "activation_checkpointing_kwargs": "train.checkpointing",
    "activation_checkpointing": "train.checkpointing",
    "activation_offloading": "train.offload",
    "attn_implementation": "train.kernels",
    "flash_attention": "train.kernels",
    "torch_compile": "train.kernels (compiled)",
    "torch_compile_backend": "train.kernels (compiled)",
    "torch_compile_mode": "train.kernels (compiled)",
    "use_liger_kernel": "train.kernels",
    "liger_kernel_config": "train.kernels",
    "compile": "train.kernels (compiled)",
    "save_steps": "train.save_every",
    "checkpoint_every": "train.save_every",
    "save_total_limit": "train.keep",
    "early_stopping_patience": "train.early_stopping",
    "eval_steps": "train.early_stopping, with its key every",
    "data_seed": "train.seed",
    "random_seed": "train.seed",
    "full_determinism": "train.seed, which decides all that is drawn",
    "fsdp": "train.shard (fsdp)",
    "fsdp_config": "train.shard (fsdp)",
    "parallelism_config": "train.shard (fsdp)",
    "deepspeed": "train.shard (fsdp)",
    "load_best_model_at_end": "train.early_stopping, which keeps the state with the lowest held-out loss",
    "eval_strategy": "train.early_stopping, with its key every",
    "save_strategy": "train.save_every",
    "num_threads": "train.threads",
    # objective and what acts between steps
    "rl_beta": "loss, with its key beta",
    "dpo_beta": "loss, with its key beta",
    "objective": "loss",
    "loss_type": "loss",
    "label_smoothing_factor": "loss, with its key label_smoothing",
    "router_aux_loss_coef": "no key: the routers of a base are frozen",
    "ref_model": "loss, with its key reference",
    "reference_model": "loss, with its key reference",
    "precompute_ref_log_probs": "no key: the reference is the base without the delta, in the same process",
    "precompute_ref_batch_size": "no key: the reference is the base without the delta, in the same process",
    "desirable_weight": "loss, with its key liked (kto)",
    "undesirable_weight": "loss, with its key not_liked (kto)",
    "disable_dropout": "delta.dropout; the base has none while it is trained",
    "epsilon": "loss, with its key low (policy-gradient)",
    "epsilon_high": "loss, with its key high (policy-gradient)",
    "importance_sampling_level": "loss, with its key ratio (policy-gradient)",
    "scale_rewards": "loss, with its key baseline (policy-gradient)",
    "steps_per_generation": "rl.steps_per_round",
    "num_iterations": "rl.steps_per_round",
    "generation_batch_size": "rl.at_once",
    "num_generations": "rl.samples",
    "max_completion_length": "rl.max_new_tokens",
    "reward_funcs": "rl.scorer",
    "reward_model": "rl.scorer",
    "neftune_noise_alpha": "callbacks (neftune)",
    "loraplus_lr_ratio": "callbacks (lora-plus)",
    # where it goes
    "report_to": "report.trackers",
    "max_eval_samples": "report.answers",
    "output_dir": f"{_CLI} --out DIR",
    "overwrite_output_dir": f"{_CLI} --overwrite",
    "resume_from_checkpoint": f"{_CLI} --resume",
    "ignore_data_skip": f"{_CLI} --resume goes on with the rows that come next",
    "restore_callback_states_from_checkpoint": f"{_CLI} --resume restores all that acts between steps",
    # what a recipe does not say
    **_all("do_train do_eval do_predict", "no key: the command says what is done, graft train or graft data check"),
    **_all("run_name project", "no key: the folder of graft train --out names the run"),
    **_all(
        "logging_steps logging_strategy logging_first_step log_on_each_node logging_nan_inf_filter "
        "include_num_input_tokens_seen log_completions log_multimodal num_completions_to_print log_unique_prompts",
        "no key: every step is written to metrics.jsonl",
    ),
    **_all("log_level log_level_replica disable_tqdm debug", "no key: how much is shown does not depend on a recipe"),
    **_all(
        "push_to_hub hub_token hub_private_repo hub_model_id hub_strategy hub_always_push hub_revision "
        "log_completions_hub_repo trackio_space_id trackio_bucket_id trackio_static_space_id",
        "no key: nothing is uploaded; `hf upload` takes the adapter folder as it is",
    ),
    **_all(
        "eval_delay eval_on_start per_device_eval_batch_size prediction_loss_only eval_do_concat_batches "
        "eval_use_gather_object eval_accumulation_steps include_for_metrics batch_eval_metrics eval_packing "
        "bf16_full_eval fp16_full_eval num_generations_eval compute_metrics",
        "no key: held-out rows (data.held_out) are measured before and after training",
    ),
    **_all("metric_for_best_model greater_is_better", "no key: train.early_stopping looks at the held-out loss"),
    **_all(
        "save_only_model save_on_each_node enable_jit_checkpoint", "no key: a checkpoint holds all that --resume needs"
    ),
    **_all("adam_beta1 adam_beta2 adam_epsilon", "no key: AdamW has betas 0.9 and 0.999 and epsilon 1e-8"),
    **_all(
        "dataloader_drop_last dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers "
        "dataloader_prefetch_factor dataloader_multiprocessing_context dataloader_in_order dataset_num_proc "
        "dataset_kwargs remove_unused_columns label_names",
        "no key: rows are read, rendered and checked on all cores before training; data.train names their files",
    ),
    **_all(
        "average_tokens_across_devices ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers "
        "ddp_static_graph ddp_backend ddp_timeout local_rank accelerator_config ds3_gather_for_generation",
        "no key: torchrun starts several processes, and the loss of a step is the same whatever their number",
    ),
    **_all("use_cpu tf32", "no key: the device is the GPU where there is one; base.dtype is the dtype"),
    **_all("auto_find_batch_size", "no key: train.pack_tokens bounds the memory, graft estimate says how much it is"),
    **_all(
        "torch_empty_cache_steps skip_memory_metrics use_cache cast_lm_head_to_fp32 pad_to_multiple_of runtime_config "
        "inference_mode task_type auto_mapping peft_version cache_implementation",
        "no key: this needs no setting",
    ),
    **_all("eos_token pad_token", "no key: the chat template writes what ends an answer, and packs hold no padding"),
    **_all(
        "loss_weights ld_alpha f_divergence_type f_alpha_divergence_coef use_weighting discopop_tau sync_ref_model "
        "ref_model_mixup_alpha ref_model_sync_steps reward_weights multi_objective_aggregation "
        "mask_truncated_completions top_entropy_quantile entropy_coef use_adaptive_entropy entropy_coef_min "
        "entropy_coef_max entropy_coef_delta entropy_target off_policy_mask_threshold use_bias_correction_kl "
        "sapo_temperature_neg sapo_temperature_pos vespo_k_pos vespo_lambda_pos vespo_k_neg vespo_lambda_neg",
        "no key: no loss here has this; docs/recipe.md lists what each has",
    ),
    **_all(
        "generation_kwargs repetition_penalty top_k min_p max_tool_calling_iterations",
        "no key: answers of `rl` are sampled with its temperature and top_p",
    ),
    **_all(
        "use_vllm vllm_mode vllm_model_impl vllm_enable_sleep_mode vllm_structured_outputs_regex vllm_server_base_url "
        "vllm_server_host vllm_server_port vllm_server_timeout vllm_group_port vllm_gpu_memory_utilization "
        "vllm_max_model_length vllm_tensor_parallel_size vllm_importance_sampling_correction "
        "vllm_importance_sampling_mode vllm_importance_sampling_clip_max vllm_importance_sampling_clip_min "
        "vllm_importance_sampling_cap use_transformers_continuous_batching transformers_continuous_batching_config "
        "use_transformers_paged",
        "no key: the model that is trained answers by itself",
    ),
    **_all("fan_in_fan_out", "no key: how the base stores a weight is read off its layers"),
    **_all(
        "megatron_config megatron_core layer_replication lora_bias alora_invocation_tokens monteclora_config "
        "use_bdlora arrow_config ensure_weight_tying",
        "no key: no method here has this; graft methods lists what there is",
    ),
}
