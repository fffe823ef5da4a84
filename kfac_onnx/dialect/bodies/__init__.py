"""Bodies of the `ai.kfac` operators, written as their formulas and compiled by onnxscript.

One module per idea. Importing any of them imports onnxscript (0.7 s), so only `library.functions` does.
All bodies are written at opset 18, mean the same at any opset from 18 to 24, and hold no state. Letters
are those of the formulas: `A` input factor, `G` output factor, `V` vocabulary, `D` width, `N` lookups.
"""
