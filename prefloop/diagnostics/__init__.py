"""What training did to a model: pure functions of log-probabilities, gradients and sampled text.

roles         chosen, rejected, other
displacement  changes of log-probability, mass, CHES
gradients     the first-order test and the bound of preference variance
ranking       who orders pairs as labelled; margins by annotator and by score
information   differential information
text          repetition and length
verdict       sentences and their thresholds (docs/diagnostics.md)
summary       diagnosis.json
"""
