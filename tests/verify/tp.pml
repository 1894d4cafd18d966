/* Leader plus mesh over broadcast (plans v0 and v1.1): rank 0 leads, ranks 1 and 2 follow.
 * Contract sections 4, 5, 6, 8, 9, 10; code: engine/comm/transport.py, the leading and following loops, engine/stage1.py.
 *
 * What is modelled: each part of a frame (header, meta, payload) is a message of its own; the collectives of phase B
 * with their order and kind; every rank can be killed or stopped between any two steps; parts can be lost and frames
 * sent twice; the leader can fail before a frame, and after phase B. What is not: bytes, tensors and durations.
 *
 * Assumptions. (1) What a rank sent before it left in good order arrives; of a killed rank it may be lost. (2) A rank
 * that waits for one that has left or was killed finds its connection closed. (3) A watchdog may fire at any moment
 * after something was lost, stopped or killed, never before (healthy timings are what heartbeats and budgets are for).
 * (4) A supervisor outside the ranks ends a stopped rank, and needs for it only that some rank has gone. A stopped rank
 * is not resumed.
 *
 * Faults, by macro: F_KILL F_FREEZE F_LOSE F_REPEAT F_PREFLIGHT F_AFTER F_ALTER; FAULTS says how many may strike.
 * Guards switched off, by macro: NO_WATCHDOG NO_CLOSE NO_DUPLICATE_CHECK NO_PREFLIGHT NO_LEADER_ERROR NO_CALL_AGREEMENT
 * NO_SUPERVISOR.
 */
#ifndef CHUNKS
#define CHUNKS 2
#endif
#include "ranks.pml"

#define P_HEADER 0
#define P_META 1
#define P_PAYLOAD 2

#define E_NONE 0    /* how the leader's stream ended by its own error */
#define E_ORDERLY 1 /* refused by prepare, or the sink: ours alone, peers drain */
#define E_TERMINAL 2
#define E_REPEATED 3 /* a frame was sent twice */

byte ending;
byte accepted, emitted, abandoned;

chan to[RANKS] = [1] of { byte, byte, byte, short, byte, bit };  /* part, action, call_id, chunk_index, epoch, init */

inline leave(me, why) {
    atomic {
        if
        :: me == 0 -> abandoned = accepted - emitted
        :: else
        fi;
        depart(me, why);
        goto out
    }
}

inline done(me, one, two) {
    if
    :: JOINED(me, one) && JOINED(me, two)
    :: LOST(me, one) -> leave(me, X_TRANSPORT)
    :: LOST(me, two) -> leave(me, X_TRANSPORT)
    :: WATCHDOG -> leave(me, X_PHASE_BUDGET)
    fi
}

/* To be done is seen by nobody, so it is one step with what follows, up to the next entry. */
inline phase_b(me, one, two, chunk) {
    enter(me, C_ENTRY);
    atomic {
        done(me, one, two);
#ifndef NO_CALL_AGREEMENT
        if
        :: planned[0] != planned[1] || planned[0] != planned[2] -> leave(me, X_TRIPWIRE)
        :: else
        fi;
#endif
        calls = 1;
        enter(me, C_CALL)
    };
    do
    :: atomic {
            done(me, one, two);
            if
            :: calls == 1 -> advance_cache(me, chunk)
            :: else
            fi;
            if
            :: calls < planned[me] -> calls++; enter(me, C_CALL)
            :: else -> calls = 0; enter(me, C_EXIT); break
            fi
        }
    od;
    done(me, one, two)
}

/* One message to both workers, in either order. A worker that was told nothing more is `sent`. */
inline broadcast(part, action) {
    sent = 0;
    do
    :: atomic { sent == 3 -> sent = 0; break }
    :: atomic { !(sent & 1) && nfull(to[1]) -> to[1]!part,action,call,chunk,epoch,fresh; sent = sent | 1 }
    :: atomic { !(sent & 2) && nfull(to[2]) -> to[2]!part,action,call,chunk,epoch,fresh; sent = sent | 2 }
    :: !(sent & 1) && CLOSED(1) -> leave(0, X_TRANSPORT)
    :: !(sent & 2) && CLOSED(2) -> leave(0, X_TRANSPORT)
#ifdef F_LOSE
    :: atomic { !(sent & 1) && faults > 0 -> faults--; silent = true; sent = sent | 1 }
#endif
    :: WATCHDOG -> leave(0, X_PHASE_BUDGET)
    od
}

inline send(action) {
    broadcast(P_HEADER, action);
    if
    :: HAS_META(action) -> broadcast(P_META, action)
    :: else
    fi;
    if
    :: HAS_PAYLOAD(action) -> broadcast(P_PAYLOAD, action)
    :: else
    fi
}

inline control(action) {
    atomic { call++; was = chunk; chunk = -1; fresh = 0 };
    send(action);
    chunk = was
}

/* The leader failed while its peers wait for a header: it sends them one. */
inline farewell() {
#ifndef NO_LEADER_ERROR
    if
    :: ending == E_ORDERLY -> control(A_SHUTDOWN)
    :: else -> control(A_ERROR)
    fi;
#endif
    leave(0, X_TRIPWIRE)
}

active proctype leader() MAY_FREEZE(0) {
    short chunk = -1, was;
    byte call, epoch, sent, calls;
    bit fresh;
    bool beat;
    {
        do
        :: chunk + 1 < CHUNKS ->
            if
            :: !beat -> beat = true; control(A_NOOP)
            :: true
            fi;
#ifdef F_PREFLIGHT
            if
            :: true
            :: atomic { faults > 0 -> faults--; accepted++; ending = E_ORDERLY };
#ifdef NO_PREFLIGHT
                call++; chunk++;
                broadcast(P_HEADER, A_INFER);   /* committed, and only now does packing fail */
#endif
                farewell()
            fi;
#endif
            atomic {
                accepted++; call++; chunk++;
                if
                :: true -> fresh = (chunk == 0)
                :: chunk > 0 -> fresh = 1; epoch++
                fi
            };
            send(A_INFER);
            atomic { planned[0] = CALLS; phase_b(0, 1, 2, chunk) };
#ifdef F_REPEAT
            if
            :: true
            :: atomic { faults > 0 -> faults--; ending = E_REPEATED };
                send(A_INFER);                  /* the same ids again, and this rank goes on to phase B */
                atomic { planned[0] = CALLS; phase_b(0, 1, 2, chunk) }
            fi;
#endif
#ifdef F_AFTER
            if
            :: true
            :: atomic { faults > 0 -> faults--; ending = E_ORDERLY }
            :: atomic { faults > 0 -> faults--; ending = E_TERMINAL }
            fi;
            if
            :: ending != E_NONE -> farewell()
            :: else
            fi;
#endif
            atomic { assert(emitted == chunk); emitted++ }
        :: else -> break
        od;
        move(0, S_DRAINING);
        control(A_SHUTDOWN);
        leave(0, X_DRAINED)
    } MAY_DIE(0);
out: skip;
    d_step { chunk = 0; was = 0; call = 0; epoch = 0; sent = 0; calls = 0; fresh = 0; beat = 0 }
}

inline wait(me, why) {
    if
    :: to[me]?part,got,got_call,got_chunk,got_epoch,fresh
    :: CLOSED(0) && empty(to[me]) -> leave(me, X_TRANSPORT)
    :: CLOSED(0) && cond[0] == KILLED -> leave(me, X_TRANSPORT)
    :: WATCHDOG -> leave(me, why)
    fi
}

#ifdef NO_DUPLICATE_CHECK
#define IDS_OK EPOCH_OK(action, got_epoch, epoch)
#else
#define IDS_OK (CALL_OK(got_call, call) && CHUNK_OK(action, got_chunk, chunk) && EPOCH_OK(action, got_epoch, epoch))
#endif
#define INIT_OK (action != A_INFER || CUT_OK(got_epoch, epoch, fresh, chunk))

inline refuse_unless(me, good) {
    if
    :: good
    :: else -> leave(me, X_TRIPWIRE)
    fi
}

proctype worker(byte me; byte other) MAY_FREEZE(me) {
    short call = -1, chunk = -1, got_call, got_chunk;
    byte epoch, got_epoch, part, action, got, calls, head;
    bit fresh;
    {
        do
        :: atomic {
                wait(me, X_ORPHANED);
                action = got; head = got_call;
                refuse_unless(me, part == P_HEADER && MESH_ACCEPTS(action) && IDS_OK)
            };
            if
            :: atomic { /* the checksum ties meta to its header, the digest ties the payload */
                    HAS_META(action) ->
                    wait(me, X_PHASE_BUDGET);
                    refuse_unless(me, part == P_META && got == action && got_call == head && INIT_OK)
                }
            :: !HAS_META(action)
            fi;
            if
            :: atomic {
                    HAS_PAYLOAD(action) ->
                    wait(me, X_PHASE_BUDGET);
                    refuse_unless(me, part == P_PAYLOAD && got == action && got_call == head)
                }
            :: !HAS_PAYLOAD(action)
            fi;
            atomic {
                call = got_call;
                if
                :: got_chunk > chunk -> chunk = got_chunk
                :: else
                fi;
                epoch = got_epoch; part = 0; got = 0; head = 0; got_call = 0; got_epoch = 0; fresh = 0;
                if
                :: action == A_NOOP
                :: action == A_SHUTDOWN -> move(me, S_DRAINING); leave(me, X_DRAINED)
                :: action == A_ERROR -> leave(me, X_PEER_ERROR)
                :: action == A_INFER ->
                    planned[me] = CALLS;
#ifdef F_ALTER
                    if
                    :: true
                    :: faults > 0 -> faults--; altered = true; planned[me] = CALLS + 1
                    fi;
#endif
                    phase_b(me, 0, other, got_chunk)
                fi;
                got_chunk = 0; action = 0
            }
        od
    } MAY_DIE(me);
out: skip; /* what a dead rank knew makes no difference */
    d_step {
        call = 0; chunk = 0; got_call = 0; got_chunk = 0; epoch = 0; got_epoch = 0; part = 0; action = 0; got = 0;
        calls = 0; head = 0; fresh = 0
    }
}

/* Kills, stops, resumes; and the supervisor, which leaves no stopped rank behind. Ends when every rank is gone. */
active proctype nature() {
    do
#ifdef F_KILL
    :: atomic { MAY_KILL(0) }
    :: atomic { MAY_KILL(1) }
    :: atomic { MAY_KILL(2) }
#endif
#ifdef F_FREEZE
    :: atomic { MAY_STOP(0) }
    :: atomic { MAY_STOP(1) }
    :: atomic { MAY_STOP(2) }
#ifndef NO_SUPERVISOR
    :: atomic { REAP(0) }
    :: atomic { REAP(1) }
    :: atomic { REAP(2) }
#endif
#endif
    :: ALL_GONE -> break
    od;
    atomic {
        assert(cond[0] == KILLED || accepted == emitted + abandoned);
        if
        :: silent
        :: else -> /* nothing was lost: every rank leaves for the reason that the contract names */
            if
            :: altered -> assert(code[0] == X_TRIPWIRE && code[1] == X_TRIPWIRE && code[2] == X_TRIPWIRE)
            :: !altered && ending == E_NONE ->
                assert(code[0] == X_DRAINED && code[1] == X_DRAINED && code[2] == X_DRAINED && emitted == CHUNKS)
            :: !altered && ending == E_ORDERLY ->
                assert(code[0] == X_TRIPWIRE && code[1] == X_DRAINED && code[2] == X_DRAINED)
            :: !altered && ending == E_TERMINAL ->
                assert(code[0] == X_TRIPWIRE && code[1] == X_PEER_ERROR && code[2] == X_PEER_ERROR)
            :: !altered && ending == E_REPEATED ->
                assert(code[0] == X_TRANSPORT && (code[1] == X_TRIPWIRE || code[2] == X_TRIPWIRE))
            fi
        fi
    }
}

init {
    atomic {
        run worker(1, 2);
        run worker(2, 1)
    }
}

ltl everyone_leaves { <> ALL_GONE }
