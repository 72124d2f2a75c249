"""Algorithms of domain generalisation on frozen features: DomainBed's, each a loss over the same small network.

What one learns from several sources is tested on one that none of them is: "In Search of Lost Domain Generalization",
Gulrajani and Lopez-Paz, ICLR 2021, whose released code the losses equal. There they train a whole network on pixels; here
what is learned in front of the classifier is a mask, as CAFE's, or a hidden layer, or both. Weight averaging, SWAD's, is no
loss but a choice of weights, which every one of them can be given: `cafe.learning.valley`.
"""
