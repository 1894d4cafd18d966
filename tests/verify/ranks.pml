/* Three ranks, how each stands, and the collectives of a mesh: shared by tp.pml and pp.pml. */
#include "tables.pml"

#ifndef FAULTS
#define FAULTS 1
#endif
#define RANKS 3
#define CALLS 1     /* generator calls of a chunk */
#define MOST (CHUNKS * (CALLS + 3) + 1)

#define UP 0        /* conditions of a process */
#define FROZEN 1
#define KILLED 2
#define LEFT 3
#define GONE(p) (cond[p] >= KILLED)
#define ALL_GONE (GONE(0) && GONE(1) && GONE(2))
#define ANY_GONE (GONE(0) || GONE(1) || GONE(2))

#define C_ENTRY 1   /* collectives of phase B */
#define C_CALL 2
#define C_EXIT 3

#ifdef F_KILL
#define MAY_DIE(p) unless { cond[p] == KILLED }
#else
#define MAY_DIE(p)
#endif
#ifdef F_FREEZE
#define MAY_FREEZE(p) provided (cond[p] != FROZEN)
#else
#define MAY_FREEZE(p)
#endif
#ifdef NO_WATCHDOG
#define WATCHDOG false
#else
#define WATCHDOG silent
#endif
#ifdef NO_CLOSE
#define CLOSED(p) false
#else
#define CLOSED(p) GONE(p)
#endif

byte cond[RANKS];
byte code[RANKS];
byte stage[RANKS] = S_RUNNING;
byte faults = FAULTS;
bool silent;        /* a process or message is missing, which only a closed connection or a watchdog can show */
bool altered;       /* one worker plans another number of calls than the rest */

byte at[RANKS];     /* collectives this rank has entered */
byte kind_of[MOST]; /* what the first rank took the n-th collective to be */
byte planned[RANKS];
bit advanced[RANKS * CHUNKS];

inline move(me, next) {
    assert(CAN_MOVE(stage[me], next));
    stage[me] = next
}

/* The last moves of a rank, and its exit code. */
inline depart(me, why) {
    code[me] = why;
    if
    :: why == X_DRAINED -> move(me, S_SHUTDOWN); move(me, S_EXITED)
    :: else -> move(me, S_ABORTED)
    fi;
    cond[me] = LEFT
}

/* A collective is entered (seen by the others), and is done once every member has entered as many as this one. */
inline enter(me, kind) {
    assert(kind_of[at[me]] == 0 || kind_of[at[me]] == kind);
    kind_of[at[me]] = kind;
    at[me]++
}

#define JOINED(me, other) (at[other] >= at[me])
#define LOST(me, other) (CLOSED(other) && (cond[other] == KILLED || at[other] < at[me]))

inline advance_cache(me, chunk) {
    assert(!advanced[me * CHUNKS + chunk]);
    advanced[me * CHUNKS + chunk] = 1
}

/* Kill or stop rank p; end a stopped rank (the supervisor needs for that only that some rank has gone). */
#define MAY_KILL(p) faults > 0 && cond[p] == UP -> cond[p] = KILLED; faults--; silent = true
#define MAY_STOP(p) faults > 0 && cond[p] == UP -> cond[p] = FROZEN; faults--; silent = true
#define REAP(p) cond[p] == FROZEN && ANY_GONE -> cond[p] = KILLED
