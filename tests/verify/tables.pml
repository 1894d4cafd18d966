/* Tables shared by tp.pml and pp.pml. Each is a pure C expression, and tests/verify/test_verify.py evaluates every one
 * over its whole range against the engine: engine.wire.header (actions, schemas, id rules) and engine.lifecycle
 * (states, moves, exit codes). A change on one side alone fails that test.
 */

/* engine.wire.header.Action */
#define A_NOOP 0
#define A_INFER 1
#define A_SHUTDOWN 2
#define A_ERROR 3
#define A_RESULT 4

/* What an action is followed by: meta when it has a schema, a payload when it carries a chunk. */
#define HAS_META(a) (a == A_INFER || a == A_ERROR || a == A_RESULT)
#define HAS_PAYLOAD(a) (a == A_INFER || a == A_RESULT)

/* Who accepts what: a mesh rank from its leader; the leader from Stage 0; Stage 0 from the leader. */
#define MESH_ACCEPTS(a) (a == A_NOOP || a == A_INFER || a == A_SHUTDOWN || a == A_ERROR)
#define LEADER_ACCEPTS(a) (a == A_NOOP || a == A_INFER || a == A_SHUTDOWN || a == A_ERROR)
#define STAGE0_ACCEPTS(a) (a == A_RESULT)

/* engine.wire.header.LinkState: call_id, chunk_index, cache_epoch, and the epoch against init_cache. */
#define CALL_OK(id, last) (id > last)
#define CHUNK_OK(a, chunk, last) ((a != A_INFER && a != A_RESULT && chunk == -1) || ((a == A_INFER || a == A_RESULT) && ((last < 0 && (chunk == -1 || chunk == 0)) || (last >= 0 && chunk == last + 1))))
#define EPOCH_OK(a, epoch, now) (epoch == now || (epoch == now + 1 && (a == A_INFER || a == A_RESULT)))
#define CUT_OK(epoch, now, init, last) ((epoch <= now || init == 1) && (epoch != now || init == 0 || last < 0))

/* engine.lifecycle.RankExit */
#define X_DRAINED 0
#define X_TRIPWIRE 70
#define X_ORPHANED 71
#define X_PHASE_BUDGET 72
#define X_PEER_ERROR 73
#define X_TRANSPORT 74

/* engine.lifecycle.RankState, and its TRANSITIONS as CAN_MOVE. The models begin with a job that is up. */
#define S_STARTING 0
#define S_JOINING 1
#define S_LOADING 2
#define S_WARMING 3
#define S_RUNNING 4
#define S_DRAINING 5
#define S_SHUTDOWN 6
#define S_EXITED 7
#define S_ABORTED 8
#define CAN_MOVE(a, b) ((a == S_STARTING && b == S_JOINING) || (a == S_JOINING && b == S_LOADING) || (a == S_LOADING && b == S_WARMING) || (a == S_WARMING && b == S_RUNNING) || (a == S_RUNNING && b == S_DRAINING) || (a == S_DRAINING && b == S_SHUTDOWN) || (a == S_SHUTDOWN && b == S_EXITED) || (b == S_ABORTED && a != S_EXITED && a != S_ABORTED))
