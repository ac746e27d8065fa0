"""What speaks for each way, against it, and what may go wrong, in words."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Words:
    for_it: tuple[str, ...]
    against: tuple[str, ...]
    risks: tuple[str, ...]


WORDS = {
    "api": Words(
        ("In use within weeks, by people who can write prompts.",
         "The best models there are; better ones come without work of yours.",
         "Costs follow the volume: little use costs little."),
        ("Text leaves the house.", "The model cannot be looked into, nor trained beyond what the provider offers.",
         "Cost grows with every token, for ever."),
        ("The provider changes or withdraws the model: keep an evaluation of your own and run it on each version.",
         "Prices have fallen year by year; they may rise.", "Outages and rate limits are the provider's to mend.")),
    "prompted": Words(
        ("Text stays where you put the machines.", "The weights stay the same until you change them.",
         "Above the break-even volume a token costs less than at an API."),
        ("Machines run, and are paid, at night too.", "Somebody keeps servers, updates and monitoring going.",
         "Open models of a size you can afford are behind the best commercial ones."),
        ("Load that is more uneven than planned: replicas idle or readers wait.",
         "Published scores do not tell how it does on your text: measure before you buy.")),
    "lora": Words(
        ("A small model learns one narrow task about as well as a far larger one does it by instruction.",
         "Minutes to hours of one or a few chips; the base model stays as it was, several adapters share it.",
         "Short prompts: what they said is learned, so fewer tokens are read."),
        ("Needs a thousand good examples, and new ones when the task changes.",
         "Adds little knowledge that the base model does not have."),
        ("What it was not trained on may become worse: evaluate that too.",
         "Examples hold private data that the adapter may repeat.")),
    "full": Words(
        ("Moves further from the base model than an adapter, for large changes of style or many tasks at once.",
         "Serves as fast as the base model, without adapters."),
        ("Memory for all weights' gradients and moments: eight times that of serving.",
         "A whole copy of the model for each variant.",
         "Some ten times the examples of LoRA, for a gain that is often small."),
        ("Forgets more of what the base model knew.", "Every new base model asks for all of it again.")),
    "continued": Words(
        ("Learns the words and facts of a field, or a language, that public text has little of.",
         "A hundredth to a thousandth of the compute of a model from scratch."),
        ("Needs billions of tokens of clean text of the field.", "Instruction tuning has to be done again afterwards.",
         "Needs people who have pretrained before."),
        ("Forgets general knowledge unless general text is mixed in.",
         "Retrieval over the same text may do as well for far less: try that first.",
         "Private text is in the weights from then on, and cannot be taken out of them.")),
    "scratch": Words(
        ("Everything is known and owned: data, tokenizer, weights, licence.", "Size and shape fit the chip and the task.",
         "The only way for a field or language that no open model serves, or to study training itself."),
        ("The dearest in money, people and time by far.", "Needs trillions of tokens for what open models give away.",
         "Open models will be better before it is ready, unless the field is your own."),
        ("Runs fail: divergence, broken data, lost machines; plan for the compute twice.",
         "The team that can do it is the hardest thing to find and keep.",
         "Copyright and privacy of the training text are yours to answer for.")),
}
