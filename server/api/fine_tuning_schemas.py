"""Fine-tuning on the wire: what a job may ask for, and the shapes of what is answered."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from server.api.metadata import Metadata
from server.api.schemas import Integer, Wire

AUTO = "auto"  # as good as left out
Count = Annotated[Integer, Field(ge=1, le=1 << 30)]
Positive = Annotated[float, Field(gt=0, le=1e6)]
Weight = Annotated[float, Field(ge=0, le=1e6)]
Share = Annotated[float, Field(ge=0, le=1)]
Init = Literal["gpt2", "xavier"]


class Inner(Wire):
    """An object within: what nobody knows is refused, for it would shape what is learnt."""

    model_config = ConfigDict(extra="forbid")


class HyperparametersBody(Inner):
    """All of them may be left out, null or `auto`. The first three are OpenAI's."""

    n_epochs: Annotated[Integer, Field(ge=1, le=1000)] | None = Field(default=None, description="default 3")
    batch_size: Annotated[Integer, Field(ge=1, le=4096)] | None = Field(
        default=None, description="examples in a step; default: by how many there are"
    )
    learning_rate_multiplier: Positive | None = Field(default=None, description="of the method's own rate")
    learning_rate: Positive | None = Field(default=None, description="at its height, in place of the method's own")
    max_steps: Count | None = Field(default=None, description="end after so many, if the epochs have more")
    early_stop: Count | None = Field(
        default=None, description="end after so many validations without a better loss, and keep the best weights"
    )
    validate_every: Count | None = Field(default=None, description="steps; default: an epoch")
    warm_up: Share | None = Field(default=None, description="of all steps; default 0.1")
    rate_floor: Share | None = Field(default=None, description="of the rate, where its cosine ends; default 0")
    weight_decay: Share | None = Field(default=None, description="default 0.01")
    clip: Positive | None = Field(default=None, description="largest norm of all gradients together; default 1")
    dropout: Annotated[float, Field(ge=0, lt=1)] | None = Field(
        default=None, description="of embeddings, attention and what layers add; default 0"
    )


class DpoHyperparametersBody(HyperparametersBody):
    beta: Annotated[float, Field(gt=0, le=2)] | None = Field(
        default=None, description="how near to its beginning the model is held; default 0.1"
    )


class LoraBody(Inner):
    rank: Annotated[Integer, Field(ge=1, le=1024)] | None = Field(default=None, description="default 8")
    alpha: Positive | None = Field(default=None, description="default 16")
    targets: list[str] | None = Field(
        default=None, min_length=1, max_length=16, description='default ["c_attn", "c_proj", "c_fc"]'
    )
    merge: bool | None = Field(default=None, description="make a whole model in place of an adapter")


class ShapeBody(Inner):
    n_layer: Count | None = None
    n_head: Count | None = None
    n_embd: Count | None = None
    n_positions: Count | None = None


class SupervisedBody(Inner):
    hyperparameters: HyperparametersBody | None = None
    trainable: Literal["lora", "full", "output_layer"] | None = Field(default=None, description="default lora")
    lora: LoraBody | None = None
    init: Init | None = Field(default=None, description="start from random weights, and train them all")
    shape: ShapeBody | None = Field(default=None, description="with `init`: where it differs from the model's")


class DistillationBody(Inner):
    """Weights of the loss's terms are relative to each other."""

    hyperparameters: HyperparametersBody | None = None
    teacher: str | None = Field(
        default=None,
        description="a served model; then `model` is the student. Default: `model`, and a student of its layers",
    )
    layers: Count | None = Field(default=None, description="of a student made of its teacher's; default: half of them")
    temperature: Positive | None = Field(default=None, description="default 2")
    soft: Weight | None = Field(default=None, description="the teacher's probabilities; default 1")
    hard: Weight | None = Field(default=None, description="the text itself; default 0")
    hidden: Weight | None = Field(default=None, description="hidden states; default 0")
    attention: Weight | None = Field(default=None, description="attention; default 0")
    embeddings: Literal["train", "freeze"] | None = Field(default=None, description="default train")
    init: Init | None = None
    shape: ShapeBody | None = None


class DpoBody(Inner):
    hyperparameters: DpoHyperparametersBody | None = None
    trainable: Literal["lora", "full", "output_layer"] | None = Field(default=None, description="default lora")
    lora: LoraBody | None = None


class MethodBody(Inner):
    type: Literal["supervised", "dpo", "distillation"]
    supervised: SupervisedBody | None = None
    dpo: DpoBody | None = None
    distillation: DistillationBody | None = None


class FineTuningBody(Wire):
    """POST /v1/fine_tuning/jobs."""

    model: str = Field(description="a served model to start from; a fine-tuned one learns further")
    training_file: str = Field(description="id of an uploaded file of JSON lines")
    validation_file: str | None = Field(default=None, description="id of one that is measured on and never learnt")
    method: MethodBody | None = Field(default=None, description="default: supervised, a LoRA adapter")
    hyperparameters: HyperparametersBody | None = Field(default=None, description="older place of the method's")
    suffix: str = Field(default="", max_length=64, description="part of the name: ft:model:suffix:id")
    seed: Integer | None = Field(default=None, ge=0, lt=1 << 32, description="same seed, same weights")
    metadata: Metadata = Field(default=None, description="16 texts at most, kept with the job")
    integrations: Any = Field(default=None, description="refused unless empty")


class FineTuneBody(Wire):
    """POST /v1/fine-tunes, as openai 0.28 has it."""

    training_file: str
    validation_file: str | None = None
    model: str = Field(default="", description="none means the one being served")
    n_epochs: Integer = Field(default=4, ge=1, le=1000)
    batch_size: Integer | None = Field(default=None, ge=1, le=4096)
    learning_rate_multiplier: float | None = Field(
        default=None, gt=0, le=1e5, description="0.1, its usual default, is the method's own rate"
    )
    prompt_loss_weight: float | None = Field(default=None, description="refused unless 0.01 or 0: no loss on prompts")
    compute_classification_metrics: bool = Field(default=False, description="refused unless false")
    suffix: str = Field(default="", max_length=64)


class FineTuningJobAnswer(BaseModel):
    id: str
    object: Literal["fine_tuning.job"]
    created_at: int
    finished_at: int | None
    estimated_finish: int | None
    status: Literal["queued", "validating_files", "running", "paused", "succeeded", "failed", "cancelled"]
    model: str
    fine_tuned_model: str | None
    organization_id: str
    training_file: str
    validation_file: str | None
    result_files: list[str]
    trained_tokens: int | None
    seed: int
    hyperparameters: dict[str, Any]
    method: dict[str, Any]
    user_provided_suffix: str | None
    error: dict[str, Any] | None
    integrations: list[Any]
    metadata: dict[str, str] | None


class EventAnswer(BaseModel):
    id: str
    object: Literal["fine_tuning.job.event"]
    created_at: int
    level: Literal["info", "warn", "error"]
    type: Literal["message", "metrics"]
    message: str
    data: dict[str, Any] | None


class CheckpointAnswer(BaseModel):
    id: str
    object: Literal["fine_tuning.job.checkpoint"]
    created_at: int
    fine_tuning_job_id: str
    fine_tuned_model_checkpoint: str
    step_number: int
    metrics: dict[str, Any]


class FineTuneAnswer(BaseModel):
    """What openai 0.28 reads."""

    id: str
    object: Literal["fine-tune"]
    created_at: int
    updated_at: int
    status: Literal["pending", "running", "succeeded", "failed", "cancelled"]
    model: str
    fine_tuned_model: str | None
    organization_id: str
    hyperparams: dict[str, Any]
    training_files: list[dict[str, Any]]
    validation_files: list[dict[str, Any]]
    result_files: list[dict[str, Any]]
