"""What of a model is trained, and how that comes out, in one shape (`interface`).

`full` trains every weight. `adapted` is what adapters share, and all that LoRA and PRILoRA are;
`sora` and `sara` add what they do otherwise. `plain_lora` is peft's LoRA in our adapters' shape.
"""
