"""How `make notebooks` runs the chapters: see the Makefile."""

c = get_config()  # noqa: F821 - nbconvert provides it

c.ExecutePreprocessor.timeout = 600
c.ExecutePreprocessor.kernel_name = "python3"
c.ExecutePreprocessor.record_timing = False

# Keep the cells' tags, and of the notebook's metadata only what says that it is Python.
c.ClearMetadataPreprocessor.enabled = True
c.ClearMetadataPreprocessor.clear_cell_metadata = False
c.ClearMetadataPreprocessor.preserve_nb_metadata_mask = {"kernelspec", ("language_info", "name")}
