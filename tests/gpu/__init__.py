"""The tier for whoever has a GPU. The folder is not named after its marker: torch on CUDA imports a package `cuda`."""
