"""The commands of `mgllava`, one module each. They import what they need when they are called."""
