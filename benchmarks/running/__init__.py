"""How a run goes through its cases: in a process that is started again where a provider takes it down."""
