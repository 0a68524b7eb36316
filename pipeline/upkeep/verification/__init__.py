"""The checks of `kalm verify`: rows and ids on the workers, a sample in the driver."""
