"""Names of settings in other tools, with the corresponding setting here.

Names are those of transformers' TrainingArguments, TRL, peft, axolotl, LLaMA-Factory, ms-swift and Unsloth. Each group
has one sentence, which also says if nothing corresponds.
"""

_ANSWERS: tuple[tuple[str, str], ...] = (
    # Duration and batch sizes
    ("this is train.epochs here", "num_train_epochs num_epochs n_epochs max_epochs"),
    (
        "this is train.steps here",
        "max_steps total_steps training_steps train_steps num_steps num_training_steps max_train_steps train_iters"
        " n_steps",
    ),
    (
        "this is train.micro_batch_tokens here, in tokens: the batch size times train.sequence_tokens",
        "per_device_train_batch_size micro_batch_size train_batch_size batch_size per_gpu_train_batch_size"
        " train_micro_batch_size_per_gpu",
    ),
    (
        "this follows from train.global_batch_tokens here, which is train.micro_batch_tokens x ranks x accumulation",
        "gradient_accumulation_steps gradient_accumulation grad_accumulation_steps accumulate_grad_batches"
        " accumulation_steps global_batch_size",
    ),
    (
        "held-out rows are forwarded in micro-batches of train.micro_batch_tokens here",
        "per_device_eval_batch_size eval_batch_size eval_accumulation_steps per_gpu_eval_batch_size",
    ),
    (
        "this is train.sequence_tokens here",
        "max_seq_length max_seq_len max_length cutoff_len sequence_len sequence_length seq_length seq_len block_size"
        " model_max_length context_length max_sequence_length dataset_text_max_length",
    ),
    (
        "this is data.packing here, packed or padded; packed documents never see each other",
        "sample_packing pad_to_sequence_len neat_packing pack_to_max_length multipack packing_strategy padding_free"
        " eval_packing eval_sample_packing use_packing group_by_length train_sampling_strategy length_column_name"
        " pad_to_multiple_of padding padding_side flash_packing",
    ),
    ("this is data.over_long here, drop or stop; text is split", "truncation truncation_side truncation_strategy"),
    ("this is train.seed here, which fixes the order of the data too", "random_seed data_seed random_state"),
    (
        "this is train.recompute here: auto, full, none, or a list of deltanet, attention, experts",
        "gradient_checkpointing use_gradient_checkpointing activation_checkpointing gradient_checkpointing_kwargs"
        " activation_checkpointing_kwargs recompute_granularity disable_gradient_checkpointing"
        " unsloth_gradient_checkpointing activation_offloading",
    ),
    (
        "there is no such setting here: rows are tokenised once into data.cache and read from it without workers",
        "dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers dataloader_prefetch_factor"
        " dataloader_drop_last dataloader_multiprocessing_context dataloader_in_order preprocessing_num_workers"
        " dataset_num_proc num_proc dataset_processes dataset_prepared_path overwrite_cache dataset_prefetch_factor"
        " streaming lazy_tokenize ignore_data_skip remove_unused_columns shuffle_merged_datasets load_from_cache_file",
    ),
    (
        "the order of the data is drawn anew in every epoch here, from train.seed",
        "shuffle dataset_shuffle disable_shuffling",
    ),
    # Optimizer
    ("this is optim.lr here", "learning_rate peak_lr max_lr base_lr"),
    (
        "this is optim.schedule here",
        "lr_scheduler_type lr_scheduler scheduler scheduler_type lr_schedule lr_decay_style lr_scheduler_name",
    ),
    (
        "this is optim.final_lr_fraction or optim.decay_ratio here",
        "lr_scheduler_kwargs min_lr min_lr_ratio min_lr_rate cosine_min_lr_ratio lr_end num_decay_steps lr_decay_ratio"
        " lr_wsd_decay_steps cosine_constant_lr_ratio",
    ),
    ("this is optim.warmup_ratio here", "warmup_fraction lr_warmup_fraction warmup_proportion"),
    ("this is optim.warmup_steps here", "num_warmup_steps lr_warmup_steps lr_warmup_iters warmup"),
    (
        "this is optim.clip_norm here",
        "max_grad_norm gradient_clipping grad_clip gradient_clip_val clip_grad_norm clip_grad",
    ),
    (
        "this is optim.name here: adamw, adam, sgd, adafactor or adamw_8bit",
        "optimizer optimizer_type optimizer_name optim_type optimizer_class",
    ),
    ("this is optim.beta1 and optim.beta2 here", "adam_beta1 adam_beta2 betas adam_beta3"),
    ("this is optim.eps here", "adam_epsilon adam_eps epsilon"),
    (
        "there is one optim.lr for all that trains here",
        "loraplus_lr_ratio loraplus_lr_embedding embedding_learning_rate lr_groups aligner_lr vit_lr optim_args"
        " optim_target_modules galore_target_modules use_galore use_badam use_apollo use_muon use_adam_mini"
        " layerwise_lr",
    ),
    (
        "there is no label smoothing or noise on embeddings here",
        "label_smoothing_factor label_smoothing neftune_noise_alpha",
    ),
    ("this is train.on_nan here, stop or skip", "logging_nan_inf_filter skip_nan_loss detect_anomaly"),
    # Adapters
    (
        "this is the section lora here; lora: null trains every parameter",
        "adapter finetuning_type train_type peft_type use_peft use_lora tuner_type full_finetuning sft_type peft_config"
        " lora_config tuner",
    ),
    ("this is lora.rank here", "lora_r lora_rank r lora_dim"),
    ("this is lora.alpha here", "lora_alpha"),
    ("this is lora.dropout here", "lora_dropout"),
    (
        "this is lora.targets here, names of layers or all-linear",
        "target_modules lora_target_modules lora_target lora_target_linear lora_modules target_parameters"
        " lora_target_parameters lora_fan_in_fan_out exclude_modules freeze_parameters trainable_parameters"
        " layers_to_transform layers_pattern lora_layers_to_transform",
    ),
    (
        "this is lora.init_from here, the folder of an adapter in peft's form",
        "adapter_name_or_path lora_model_dir adapter_path resume_from_adapter peft_model_path adapters adapter_folder",
    ),
    ("this is lora.use_rslora here", "rslora lora_use_rslora use_rs_lora"),
    (
        "there is no such form of adapter here: only LoRA, with or without lora.use_rslora",
        "use_dora lora_use_dora peft_use_dora pissa_init pissa_iter loftq_config eva_config corda_config"
        " init_lora_weights lora_bias bias alora_invocation_tokens use_qalora layer_replication rank_pattern"
        " alpha_pattern use_llama_pro relora relora_steps lora_mlp_kernel lora_qkv_kernel lora_o_kernel"
        " trainable_token_indices fan_in_fan_out task_type lora_ga_config velora_config qalora_group_size use_bdlora"
        " monteclora_config runtime_config arrow_config kasa_config ensure_weight_tying megatron_config megatron_core",
    ),
    (
        "adapters train no other layers here; router.train trains the routers, and lora: null every parameter",
        "modules_to_save lora_modules_to_save additional_target additional_trainable_parameters unfrozen_parameters"
        " freeze_trainable_layers freeze_trainable_modules train_on_embeddings",
    ),
    # Numbers and memory
    (
        "there is no training on quantised weights here; what a rank cannot hold is divided by parallel.expert,"
        " parallel.zero_stage and parallel.offload, and `plan` counts it",
        "load_in_4bit load_in_8bit quantization_bit quantization_method quant_method quantization quant_bits qlora"
        " bnb_4bit_compute_dtype bnb_4bit_quant_type bnb_4bit_use_double_quant bnb_config_kwargs bnb_config"
        " quantization_config gptq double_quantization fp8 load_in_fp8 int8",
    ),
    (
        "this is model.dtype here: auto, bfloat16 or float32; what trains is float32 in any case",
        "bf16 fp16 fp32 float16 torch_dtype mixed_precision pure_bf16 bfloat16 float32 bf16_full_eval fp16_full_eval"
        " precision upcast_layernorm upcast_lmhead_output half_precision_backend compute_dtype tf32",
    ),
    (
        "kernels are chosen in the section kernels here, and each is compared with its definition at start",
        "flash_attention flash_attn flash_attn_2 flash_attention_2 attn_implementation attn_impl use_flash_attention"
        " use_flash_attn xformers_attention sdp_attention sdpa_attention use_liger_kernel enable_liger_kernel"
        " liger_kernel_config liger use_unsloth use_unsloth_gc liger_fused_linear_cross_entropy use_kernels"
        " experts_implementation shift_attn",
    ),
    (
        "nothing is compiled at start here; kernels are chosen in the section kernels",
        "torch_compile torch_compile_backend torch_compile_mode compile use_cpu use_ipex jit_mode_eval"
        " torch_empty_cache_steps use_cache",
    ),
    (
        "DeepSpeed is configured from the sections train, optim and parallel here",
        "deepspeed deepspeed_config ds_config zero zero_optimization accelerator_config",
    ),
    (
        "weights are divided by parallel.expert and the optimizer's state by parallel.zero_stage here",
        "fsdp fsdp_config fsdp_transformer_layer_cls_to_wrap parallelism_config tensor_parallel_size pp_size tp_size"
        " pipeline_model_parallel_size tensor_model_parallel_size dp_shard_size dp_replicate_size device_map"
        " context_parallel_size sequence_parallel_size sequence_parallel_degree max_memory cp_size",
    ),
    (
        "this is parallel.expert here",
        "expert_model_parallel_size expert_parallel_size ep_size expert_parallel moe_ep_size",
    ),
    (
        "this is parallel.offload and parallel.offload_path here",
        "offload_optimizer offload_param cpu_offload offload_folder optimizer_offload offload_state_dict"
        " optimizer_cpu_offload",
    ),
    (
        "there is no such setting here: processes are started by DeepSpeed's launcher, launch.sh or SLURM",
        "local_rank ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers ddp_backend ddp_timeout"
        " ddp_static_graph num_processes num_machines nproc_per_node world_size average_tokens_across_devices",
    ),
    ("the batch is as the recipe says; `plan` finds out beforehand whether it fits", "auto_find_batch_size"),
    # Mixture of experts
    (
        "this is router.balance.coefficient here",
        "router_aux_loss_coef aux_loss_coef moe_aux_loss_coef moe_aux_loss_coeff load_balancing_loss_coef"
        " aux_loss_coeff moe_router_load_balancing_type output_router_logits",
    ),
    (
        "this is router.z_coefficient here",
        "router_z_loss_coef moe_z_loss_coeff moe_z_loss_coef z_loss z_loss_coef z_loss_weight",
    ),
    (
        "no token is dropped here, so experts have no capacity",
        "moe_expert_capacity_factor expert_capacity capacity_factor",
    ),
    # Model and data
    (
        "this is model.path here",
        "model_name_or_path base_model model_name model_id model_id_or_path pretrained_model_name_or_path"
        " base_model_name_or_path hf_model_id checkpoint_path tokenizer_name_or_path tokenizer_name tokenizer_path"
        " base_model_config tokenizer_config tokenizer model_type model_revision revision revision_of_model"
        " tokenizer_type",
    ),
    (
        "code of a checkpoint is never run here, and hub downloads follow huggingface_hub's own settings",
        "trust_remote_code use_auth_token hf_hub_token hf_token token use_fast_tokenizer tokenizer_use_fast use_hf"
        " hub_token_of_model cache_dir hf_use_auth_token",
    ),
    (
        "this is data.train here, a list of {path: ...}",
        "dataset datasets train_file train_data dataset_name dataset_path train_dataset data_files data_path"
        " dataset_dir train_files dataset_config dataset_split custom_train_dataset_path pretraining_dataset",
    ),
    (
        "this is data.eval here, a list of {path: ...} of rows that are held out",
        "eval_dataset val_dataset validation_file test_datasets val_file eval_data eval_file val_size val_set_size"
        " split_dataset_ratio test_size validation_split do_eval eval_datasets custom_val_dataset_path",
    ),
    (
        "this is the format of a source in data.train here; auto tells it by the columns",
        "dataset_text_field text_column prompt_column response_column dataset_type stage columns"
        " message_property_mappings"
        " field_messages conversation conversation_extension mix_strategy interleave_probs",
    ),
    (
        "rows are rendered with the chat template of the model's folder here; edit chat_template.jinja in a copy of it",
        "chat_template template chat_template_path chat_template_jinja default_system system system_prompt"
        " special_tokens eos_token added_tokens add_tokens new_special_tokens tokens add_bos_token add_eos_token"
        " pad_token resize_vocab unk_token",
    ),
    (
        "in chats and in prompt and completion only what the model is to say is trained here",
        "train_on_inputs completion_only_loss assistant_only_loss train_on_prompt mask_history response_template"
        " roles_to_train train_on_eos instruction_template loss_scale train_on_responses_only mask_inputs train_on_eot",
    ),
    ("this is data.on_bad_row here, stop or skip", "strict skip_bad_rows skip_prepare_dataset dataset_kwargs"),
    ("cut the files of data.train instead", "max_samples max_train_samples max_eval_samples num_samples limit"),
    # Reports, checkpoints, results
    (
        "this is output.dir here, and name is the folder in it",
        "output_dir output_folder out_dir save_dir outputdir logging_dir",
    ),
    ("this is name here", "run_name experiment_name wandb_name wandb_run_name wandb_run_id exp_name"),
    (
        "this is monitor.wandb here, offline, online or off",
        "report_to wandb_mode use_wandb wandb_watch wandb_log_model logger",
    ),
    ("this is monitor.project here", "wandb_project wandb_entity project_name"),
    (
        "reports go to metrics.jsonl, the console and Weights & Biases here",
        "tensorboard use_tensorboard use_mlflow mlflow_tracking_uri comet_project_name swanlab_project use_swanlab"
        " use_comet trackio_space_id trackio_bucket_id trackio_static_space_id plot_loss",
    ),
    ("this is train.log_every_steps here", "logging_steps log_interval logging_interval log_every log_every_n_steps"),
    (
        "the first and the last step always report here, and train.log_every_steps says how often in between",
        "logging_first_step logging_strategy log_level log_level_replica log_on_each_node disable_tqdm"
        " include_num_input_tokens_seen include_tokens_per_second include_for_metrics skip_memory_metrics debug"
        " verbose",
    ),
    (
        "this is train.eval_every_steps here; the loss is also measured before the first step and after the last",
        "eval_steps eval_interval evals_per_epoch eval_on_start eval_delay evaluation_strategy eval_strategy"
        " eval_every val_check_interval",
    ),
    (
        "held-out rows are measured by their loss per token here, and by nothing else",
        "compute_metrics eval_table_size eval_sample_strategy eval_do_concat_batches eval_use_gather_object"
        " batch_eval_metrics prediction_loss_only predict_with_generate do_predict eval_causal_lm_metrics label_names"
        " do_bench_eval",
    ),
    (
        "this is checkpoint.every_steps here",
        "save_steps save_interval saves_per_epoch save_strategy checkpoint_interval save_every checkpointing_steps",
    ),
    ("this is checkpoint.keep here", "save_total_limit keep_last_n_checkpoints max_checkpoints save_limit max_to_keep"),
    (
        "this is checkpoint.keep_best here, by the held-out loss; `export --checkpoint best` takes it",
        "load_best_model_at_end metric_for_best_model greater_is_better save_best save_best_only best_model_metric",
    ),
    (
        "checkpoints hold what a run needs to go on here, and `python -m finetune export` writes a model or an adapter",
        "save_only_model save_safetensors save_on_each_node save_model merge_lora export_dir merge_weights"
        " save_16bit_model stage3_gather_16bit_weights_on_model_save include_inputs_for_metrics save_first_step",
    ),
    (
        "nothing is uploaded here; `python -m finetune export` writes a folder that you can upload",
        "push_to_hub hub_model_id hub_token hub_strategy hub_private_repo hub_always_push hub_revision"
        " push_to_hub_model_id hub_private",
    ),
    (
        "this is checkpoint.resume_from here; without it a run goes on from the newest checkpoint in its folder",
        "resume_from_checkpoint resume_from_ckpt load_checkpoint ckpt_path resume_checkpoint",
    ),
    (
        "this is train.early_stopping_patience and train.early_stopping_threshold here",
        "early_stopping early_stopping_steps early_stop early_stopping_callback early_stop_interval patience min_delta",
    ),
    (
        "a run folder is never overwritten here: the same command goes on with its run; name: starts another",
        "overwrite_output_dir resume ignore_resume auto_resume auto_resume_from_checkpoints do_train"
        " restore_callback_states_from_checkpoint enable_jit_checkpoint",
    ),
    (
        "every draw follows from train.seed here, and a resumed run repeats what an undisturbed one computes",
        "full_determinism deterministic use_deterministic_algorithms",
    ),
    (
        "only supervised fine-tuning and pretraining are here, no preference optimisation and no reward model",
        "rlhf_type rl pref_beta pref_loss beta dpo_beta simpo_gamma kto_chosen_weight ref_model reward_model"
        " orpo_alpha num_generations",
    ),
)
_8_BIT = "that is adamw_8bit here"
_NO_PAGES = (
    "there is no paged optimizer here; adamw_8bit keeps moments in 8 bits, parallel.zero_stage divides the state over"
    " the ranks, and parallel.offload keeps it in host memory or on a disk"
)
# Values with another name elsewhere: last part of our key, the value there, the answer.
_VALUES = {
    ("schedule", "warmup_stable_decay"): "that is wsd here",
    ("schedule", "cosine_with_min_lr"): "that is cosine here, with optim.final_lr_fraction",
    ("schedule", "cosine_warmup_with_min_lr"): "that is cosine here, with optim.final_lr_fraction",
    ("schedule", "cosine_with_restarts"): "there are no restarts here; cosine falls once",
    ("schedule", "polynomial"): "linear is the nearest here",
    ("schedule", "inverse_sqrt"): "there is no such schedule here",
    ("schedule", "reduce_lr_on_plateau"): "there is no such schedule here",
    ("name", "adamw_torch"): "that is adamw here",
    ("name", "adamw_torch_fused"): "that is adamw here",
    ("name", "adamw_hf"): "that is adamw here",
    ("name", "adamw_bnb_8bit"): _8_BIT,
    ("name", "paged_adamw_8bit"): _NO_PAGES,
    ("name", "adam8bit"): "adamw_8bit is the only one in 8 bits here",
    ("name", "adamw8bit"): _8_BIT,
    ("name", "paged_adamw_32bit"): _NO_PAGES,
    ("dtype", "float16"): "there is no float16 here; bfloat16 has its size",
    ("dtype", "fp16"): "there is no float16 here; bfloat16 has its size",
    ("dtype", "half"): "there is no float16 here; bfloat16 has its size",
    ("dtype", "bf16"): "that is bfloat16 here",
    ("dtype", "fp32"): "that is float32 here",
    ("targets", "all"): "that is all-linear here",
    ("targets", "linear"): "that is all-linear here",
    (
        "targets",
        "gate_proj",
    ): "experts means all three matrices of every routed expert, shared_expert those of the other",
    ("targets", "up_proj"): "experts means all three matrices of every routed expert, shared_expert those of the other",
    (
        "targets",
        "down_proj",
    ): "experts means all three matrices of every routed expert, shared_expert those of the other",
    ("targets", "gate_up_proj"): "experts means all three matrices of every routed expert",
    ("targets", "gate"): "the router has no adapter; router.train trains it",
    ("targets", "lm_head"): "the output layer has no adapter here",
    ("targets", "embed_tokens"): "the embedding has no adapter here",
    ("format", "messages"): "that is chat here",
    ("format", "chatml"): "that is chat here",
    ("format", "conversational"): "that is chat here",
    ("format", "chat_template"): "that is chat here",
    ("format", "openai"): "that is chat here",
    ("format", "instruction"): "that is alpaca here",
    ("format", "completion"): "that is text here",
    ("format", "pretrain"): "that is text here",
    ("wandb", "disabled"): "that is off here",
    ("wandb", "none"): "that is off here",
    ("offload", "disk"): "that is nvme here",
    ("offload", "true"): "cpu keeps the state in host memory, nvme on a disk",
    ("offload", "false"): "that is none here",
}
_BY_NAME = {name: answer for answer, names in _ANSWERS for name in names.split()}


def familiar(name: str) -> str | None:
    """The answer to another tool's name of a setting, as half a sentence; None if no tool has it."""
    return _BY_NAME.get(name.lower().lstrip("-").replace("-", "_"))


def familiar_value(key: str, value: str) -> str | None:
    """The answer to another tool's value of one of our settings, or None."""
    name = next(part for part in reversed(key.split(".")) if not part.isdecimal() and part != "N")
    return _VALUES.get((name, value.lower()))
