/* Two parties plus mesh (plans pp0 and pp1): rank 0 is Stage 0 with its comms thread, rank 1 leads the mesh, rank 2 follows.
 * Contract sections 3, 4, 5, 8, 9, 10, 11.
 *
 * What is modelled: the bounded queues d_in and d_out, Stage 0 and the comms thread as two threads of one rank, the
 * link as a rendezvous (neither side may count on a buffer), hard cuts with work in flight, judgement of results,
 * validation before the mesh is entered, ERROR on the mesh plus an error result, one answer an envelope. A frame is one
 * message here; its parts are taken apart in tp.pml.
 *
 * Assumptions: those of tp.pml. A delayed message is held by the network and may be overtaken by any number of others.
 *
 * Faults, by macro: F_KILL F_FREEZE F_LOSE F_LATE F_REPEAT F_REJECT F_ALTER; FAULTS says how many may strike.
 * Guards switched off, by macro: NO_WATCHDOG NO_CLOSE NO_EPOCH_CHECK NO_RESULT_CHECK NO_AHEAD_CHECK NO_DUPLICATE_CHECK
 * NO_LEADER_ERROR NO_ANSWER NO_CALL_AGREEMENT NO_SUPERVISOR; designs that must not be built: LATE_VALIDATION
 * BLOCKING_COMMS BLOCKING_PUT EPOCH_BEFORE_DUPLICATE.
 */
#ifndef CHUNKS
#define CHUNKS 4
#endif
#ifndef D_IN
#define D_IN 2
#endif
#ifndef D_OUT
#define D_OUT 2
#endif
#ifndef CUTS
#define CUTS 1
#endif
#include "ranks.pml"

#define NONE 0      /* what became of a chunk */
#define FLYING 1
#define EMITTED 2
#define DROPPED 3

chan d_in = [D_IN] of { byte, byte, byte, bit, bit };    /* action, chunk_index, epoch, init, bad */
chan d_out = [D_OUT] of { byte, byte };                  /* chunk_index, epoch */
chan down[2] = [0] of { byte, byte, byte, bit, bit };       /* as d_in; call_id is chunk_index + 1 */
chan up[2] = [0] of { byte, byte, bit };                    /* chunk_index, epoch, ok */
chan mesh = [1] of { byte, byte, byte, bit };            /* action, chunk_index, epoch, init */
/* Index 1 of down and up has nobody at its other end: sending there is how a guard waits together with a rendezvous. */
#define OPEN(guard) (guard -> 0 : 1)
chan late_down = [1] of { byte, byte, byte, bit, bit };
chan late_up = [1] of { byte, byte, bit };

byte state[CHUNKS];
byte epoch_of[CHUNKS];
byte accepted, emitted, dropped, repeats, flying;
byte asked, answered;
bool rejected;      /* an envelope was planted that the leader must refuse */
bool overtaken;     /* a message was delayed */
bool said_goodbye;  /* the comms thread has sent SHUTDOWN */

/* Rank 0 ends: every chunk that it accepted was emitted, dropped, or is abandoned now. */
inline leave0(why) {
    atomic {
        assert(cond[0] == UP);
        assert(accepted == emitted + dropped + flying);     /* what flies now is abandoned */
        depart(0, why);
        goto out
    }
}

inline settle(chunk, what) {
    if
    :: state[chunk] == FLYING -> flying--
    :: else
    fi;
    state[chunk] = what
}

inline judge(chunk, born) {
    expected = 0;
    do
    :: expected < CHUNKS && !(state[expected] == FLYING && epoch_of[expected] == epoch) -> expected++
    :: else -> break
    od;
    if
#ifdef EPOCH_BEFORE_DUPLICATE
    :: born < epoch -> dropped++; settle(chunk, DROPPED)
    :: born >= epoch && state[chunk] != FLYING -> repeats++
#else
#ifndef NO_RESULT_CHECK
    :: state[chunk] != FLYING -> repeats++      /* counted apart: it is nobody's share of `accepted` */
#endif
#ifndef NO_EPOCH_CHECK
    :: state[chunk] == FLYING && born < epoch -> dropped++; settle(chunk, DROPPED)
#endif
#endif
#ifndef NO_AHEAD_CHECK
    :: state[chunk] == FLYING && born == epoch && chunk > expected -> leave0(X_TRIPWIRE)
#endif
    :: else ->                                  /* decode and emit */
        assert(state[chunk] == FLYING);         /* never twice */
        assert(born == epoch);                  /* never stale */
        assert(chunk == expected);              /* never out of order */
        emitted++;
        settle(chunk, EMITTED)
    fi;
    expected = 0
}

active proctype stage0() MAY_FREEZE(0) {
    byte next, epoch, cuts, chunk, born, expected;
    bit fresh, bad;
    bool closing;
    {
        do
#ifdef BLOCKING_PUT
        :: atomic { next < CHUNKS ->
#else
        :: atomic { next < CHUNKS && nfull(d_in) ->
#endif
                if
                :: true -> fresh = (next == 0)
                :: next > 0 && cuts < CUTS -> cuts++; epoch++; fresh = 1
                fi;
#ifdef F_REJECT
                if
                :: true
                :: faults > 0 -> faults--; rejected = true; bad = 1
                fi;
#endif
                accepted++; flying++; state[next] = FLYING; epoch_of[next] = epoch;
                d_in!A_INFER,next,epoch,fresh,bad;
                next++; fresh = 0; bad = 0
            }
        :: atomic { d_out?chunk,born -> judge(chunk, born); chunk = 0; born = 0 }
        :: atomic { next == CHUNKS && flying == 0 && !closing ->
                closing = true; move(0, S_DRAINING); d_in!A_SHUTDOWN,0,epoch,0,0 }
        :: said_goodbye -> leave0(X_DRAINED)
        :: WATCHDOG -> leave0(X_PHASE_BUDGET)
        od
    } unless { GONE(0) };
out: skip;
    d_step { next = 0; epoch = 0; cuts = 0; chunk = 0; born = 0; fresh = 0; bad = 0; closing = 0 }
}

#ifdef BLOCKING_COMMS
#define MAY_RECEIVE (len(d_out) < D_OUT && !holding && len(d_in) == 0)
#else
#define MAY_RECEIVE (len(d_out) < D_OUT)
#endif
#define MAY_SEND (holding && (action == A_SHUTDOWN || len(d_out) < D_OUT))

/* Owns the link. It never waits for one direction alone: the leader may be waiting in the other. */
active proctype comms() MAY_FREEZE(0) {
    byte action, chunk, epoch, got, born;
    bit fresh, bad, ok;
    bool holding, again;
    {
        do
        :: atomic { !holding && nempty(d_in) -> d_in?action,chunk,epoch,fresh,bad; holding = true }
        :: atomic {
                down[OPEN(MAY_SEND)]!action,chunk,epoch,fresh,bad ->
                said_goodbye = (action == A_SHUTDOWN);
                if
                :: again -> again = false; holding = false
                :: !again -> holding = false
#ifdef F_REPEAT
                :: !again && faults > 0 && action == A_INFER -> faults--; again = true
#endif
                fi
            }
        :: atomic {
                up[OPEN(MAY_RECEIVE)]?got,born,ok ->
                if
                :: ok -> d_out!got,born
                :: else -> leave0(X_PEER_ERROR)
                fi;
                got = 0; born = 0; ok = 0
            }
#ifdef F_LOSE
        :: atomic { MAY_SEND && faults > 0 && action == A_INFER -> faults--; silent = true; holding = false }
#endif
#ifdef F_LATE
        :: atomic { MAY_SEND && faults > 0 && action == A_INFER ->
                faults--; overtaken = true; holding = false; late_down!action,chunk,epoch,fresh,bad }
#endif
        :: CLOSED(1) && !said_goodbye -> leave0(X_TRANSPORT)
        od
    } unless { GONE(0) };
out: skip;
    d_step {
        action = 0; chunk = 0; epoch = 0; got = 0; born = 0; fresh = 0; bad = 0; ok = 0; holding = false; again = false
    }
}

/* The leader ends. A live one owes no answer: only a watchdog, which cannot speak, may leave an envelope without. */
inline leave1(why) {
    atomic {
        assert(asked == answered || why == X_PHASE_BUDGET || GONE(0));
        depart(1, why);
        goto out
    }
}

inline answer(good) {
    if
    :: up[0]!chunk,epoch,good -> answered++
#ifdef F_LOSE
    :: atomic { faults > 0 -> faults--; silent = true; answered++ }
#endif
#ifdef F_LATE
    :: atomic { faults > 0 -> faults--; overtaken = true; late_up!chunk,epoch,good; answered++ }
#endif
#ifdef F_REPEAT
    :: atomic { faults > 0 -> faults-- };
        if
        :: up[0]!chunk,epoch,good -> answered++
        :: CLOSED(0) -> leave1(X_TRANSPORT)
        fi;
        if
        :: up[0]!chunk,epoch,good
        :: CLOSED(0)
        :: WATCHDOG
        fi
#endif
    :: CLOSED(0) -> leave1(X_TRANSPORT)
    :: WATCHDOG -> leave1(X_PHASE_BUDGET)
    fi
}

inline fail(why) {
#ifndef NO_ANSWER
    answer(0);
#endif
    leave1(why)
}

inline say(what) {
    if
    :: mesh!what,chunk,epoch,fresh
    :: CLOSED(2) -> fail(X_TRANSPORT)
    :: WATCHDOG -> leave1(X_PHASE_BUDGET)
    fi
}

inline done1() {
    if
    :: JOINED(1, 2)
    :: LOST(1, 2) -> fail(X_TRANSPORT)
    :: WATCHDOG -> leave1(X_PHASE_BUDGET)
    fi
}

#define FOLLOWS (LEADER_ACCEPTS(action) && CALL_OK(CALL_ID, call) && CHUNK_OK(action, INDEX, last) && EPOCH_OK(action, epoch, now) && (action != A_INFER || CUT_OK(epoch, now, fresh, last)))
#define CALL_ID (action == A_INFER -> chunk + 1 : CHUNKS + 1)
#define INDEX (action == A_INFER -> chunk : -1)
#ifdef NO_DUPLICATE_CHECK
#define REPEATED false
#define ACCEPTABLE (FOLLOWS || (action == A_INFER && chunk + 1 == call))
#else
#define REPEATED (action == A_INFER && chunk + 1 == call && epoch == now)
#define ACCEPTABLE FOLLOWS
#endif

active proctype leader() MAY_FREEZE(1) {
    short call = 0, last = -1;
    byte action, chunk, epoch, now, calls;
    bit fresh, bad;
    {
        do
        :: atomic {
                if
                :: down[0]?action,chunk,epoch,fresh,bad
                :: CLOSED(0) -> leave1(X_TRANSPORT)
                :: CLOSED(2) -> leave1(X_TRANSPORT)     /* idle, and a mesh rank is gone */
                :: WATCHDOG -> leave1(X_ORPHANED)
                fi;
                if
                :: REPEATED -> goto next                /* dropped and recorded; its one answer is on its way */
                :: else
                fi;
                asked = asked + (action == A_INFER && chunk + 1 != call)
            };
#ifdef LATE_VALIDATION
            say(action);
#endif
            if
            :: ACCEPTABLE && !bad
            :: else ->
                asked = answered + 1;
#ifndef NO_LEADER_ERROR
                say(A_ERROR);
#endif
                fail(X_TRIPWIRE)
            fi;
#ifndef LATE_VALIDATION
            say(action);
#endif
            if
            :: action == A_SHUTDOWN -> move(1, S_DRAINING); leave1(X_DRAINED)
            :: action == A_INFER
            fi;
            atomic { call = CALL_ID; last = chunk; now = epoch; planned[1] = CALLS; enter(1, C_ENTRY) };
            atomic {
                done1();
#ifndef NO_CALL_AGREEMENT
                if
                :: planned[1] != planned[2] -> fail(X_TRIPWIRE)
                :: else
                fi;
#endif
                enter(1, C_CALL)
            };
            atomic { done1(); advance_cache(1, chunk); enter(1, C_EXIT) };
            atomic { done1(); answer(1) };
next:       atomic { chunk = 0; epoch = 0; fresh = 0; bad = 0; action = 0 }
        od
    } MAY_DIE(1);
out: skip;
    d_step { call = 0; last = 0; action = 0; chunk = 0; epoch = 0; now = 0; fresh = 0; bad = 0 }
}

inline leave2(why) {
    atomic { depart(2, why); goto out }
}

inline done2() {
    if
    :: JOINED(2, 1)
    :: LOST(2, 1) -> leave2(X_TRANSPORT)
    :: WATCHDOG -> leave2(X_PHASE_BUDGET)
    fi
}

active proctype worker() MAY_FREEZE(2) {
    short call = 0, last = -1;
    byte action, chunk, epoch, now, calls;
    bit fresh;
    {
        do
        :: atomic {
                if
                :: mesh?action,chunk,epoch,fresh
                :: CLOSED(1) && empty(mesh) -> leave2(X_TRANSPORT)
                :: CLOSED(1) && cond[1] == KILLED -> leave2(X_TRANSPORT)
                :: WATCHDOG -> leave2(X_ORPHANED)
                fi;
                if
                :: action == A_ERROR -> leave2(X_PEER_ERROR)
                :: action != A_ERROR && !(MESH_ACCEPTS(action) && ACCEPTABLE) -> leave2(X_TRIPWIRE)
                :: else
                fi;
                if
                :: action == A_SHUTDOWN -> move(2, S_DRAINING); leave2(X_DRAINED)
                :: else
                fi;
                call = CALL_ID; last = chunk; now = epoch; planned[2] = CALLS;
#ifdef F_ALTER
                if
                :: true
                :: faults > 0 -> faults--; altered = true; planned[2] = CALLS + 1
                fi;
#endif
                enter(2, C_ENTRY)
            };
            atomic {
                done2();
#ifndef NO_CALL_AGREEMENT
                if
                :: planned[1] != planned[2] -> leave2(X_TRIPWIRE)
                :: else
                fi;
#endif
                enter(2, C_CALL)
            };
            calls = 1;
            do
            :: atomic {
                    done2();
                    if
                    :: calls == 1 -> advance_cache(2, chunk)
                    :: else
                    fi;
                    if
                    :: calls < planned[2] -> calls++; enter(2, C_CALL)
                    :: else -> calls = 0; enter(2, C_EXIT); break
                    fi
                }
            od;
            atomic { done2(); chunk = 0; epoch = 0; fresh = 0; action = 0 }
        od
    } MAY_DIE(2);
out: skip;
    d_step { call = 0; last = 0; action = 0; chunk = 0; epoch = 0; now = 0; calls = 0; fresh = 0 }
}

/* Kills, stops, delivers what was delayed, and is the supervisor. Ends when every rank is gone. */
active proctype nature() {
    byte action, chunk, epoch;
    bit fresh, bad;
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
#ifdef F_LATE
    :: nempty(late_down) ->
        late_down?action,chunk,epoch,fresh,bad;
        if
        :: down[0]!action,chunk,epoch,fresh,bad
        :: GONE(1)
        fi
    :: nempty(late_up) ->
        late_up?chunk,epoch,fresh;
        if
        :: up[0]!chunk,epoch,fresh
        :: GONE(0)
        fi
#endif
    :: ALL_GONE -> break
    od;
    atomic {
        if
        :: silent || overtaken
        :: else -> /* nothing was lost: every rank leaves for the reason that the contract names */
            if
            :: rejected -> assert(code[0] == X_PEER_ERROR && code[1] == X_TRIPWIRE && code[2] == X_PEER_ERROR)
            :: altered -> assert(code[0] == X_PEER_ERROR && code[1] == X_TRIPWIRE && code[2] == X_TRIPWIRE)
            :: else ->
                assert(code[0] == X_DRAINED && code[1] == X_DRAINED && code[2] == X_DRAINED);
                assert(accepted == CHUNKS && flying == 0)
            fi
        fi
    }
}

ltl everyone_leaves { <> ALL_GONE }
