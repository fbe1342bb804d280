"""Model families: one file each, one table; a second one for those that can be calibrated."""

MODELS: dict[str, str] = {
    "qwen2": "engine.models.qwen2:Qwen2ForCausalLM",
}
"""`model_type` of config.json -> lazy "module:Class" of an `engine.models.base.CausalLM`."""

STAGES: dict[str, str] = {
    "qwen2": "engine.quantize.qwen2_stages:Qwen2Stages",
}
"""`model_type` -> lazy "module:Class" of an `engine.quantize.stages.LayerStages`."""
