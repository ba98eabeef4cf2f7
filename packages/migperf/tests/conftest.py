from shared_core import testing

testing.check_annotations("migperf", int_for_float=True)
testing.hypothesis_profile()
