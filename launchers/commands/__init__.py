"""The sub-commands of ``armd``, a module each; ``launchers.cli`` lists them."""
