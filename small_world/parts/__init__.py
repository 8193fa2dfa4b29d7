"""The parts of the small model, trained from nothing on the pictures and words of the small world.

They take the place of what the paper starts from: CLIP, a CLIP ConvNeXt, a language model, RAM++ and OWLv2. Those were
trained on millions of captions; here the generator knows what every object is, so the towers learn from that as well.
"""
