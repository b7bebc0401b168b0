"""The accuracy-compute study: runs every strategy on the same problems, fits laws, and writes report and plots."""
