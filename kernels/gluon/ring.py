"""A ring of stages in shared memory: a producer fills them one after the other, consumers empty them in the same order.

Every stage has two barriers, ready and empty. Whoever is at its n-th stage waits for the n // STAGES-th turn of stage
n % STAGES; a barrier tells even turns from odd ones, and this is the one place that counts them.
"""

from . import LOADABLE

if LOADABLE:
    from . import gl, gluon, mbarrier

    @gluon.jit
    def new_ring(STAGES: gl.constexpr, CONSUMERS: gl.constexpr):
        """Barriers ready and empty of every stage; a stage is empty when all consumers have released it."""
        ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
        empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
        for i in gl.static_range(STAGES):
            mbarrier.init(ready.index(i), count=1)
            mbarrier.init(empty.index(i), count=CONSUMERS)
        return ready, empty

    @gluon.jit
    def place_of(n, RING: gl.constexpr, STAGES: gl.constexpr):
        """Where the n-th stage of a ring is, one of several side by side, and the parity of its turn."""
        n = n.to(gl.uint32)  # a sign would cost instructions
        return RING * STAGES + (n % STAGES).to(gl.int32), (n // STAGES & 1).to(gl.int32)

    @gluon.jit
    def acquire(empty, n, STAGES: gl.constexpr):
        """A producer waits until its n-th stage is free."""
        mbarrier.wait(empty.index(n % STAGES), (n // STAGES & 1) ^ 1)

    @gluon.jit
    def await_stage(ready, n, STAGES: gl.constexpr):
        """A consumer waits until its n-th stage is filled."""
        mbarrier.wait(ready.index(n % STAGES), n // STAGES & 1)

    @gluon.jit
    def release(empty, n, STAGES: gl.constexpr):
        """A consumer is done with its n-th stage."""
        mbarrier.arrive(empty.index(n % STAGES), count=1)
