/* KV transfers over one link, as kvtransfer/ and decode_svc/ run them; `make model` checks all of it.
 *
 * One sender P, one receiver D, N transfers of F frames each (of blocks and layers in whatever order they are written), E epochs of the link, S slabs, B blocks in D's pool.
 * A block holds one transfer. An action that the code takes under the pump's lock, or on one thread without waiting,
 * is one atomic step here; everything else interleaves: P's loop and pump, D's loop, pump and engine thread, the gateway.
 * What can go wrong: an epoch breaks at any moment and the two sides notice at different times; the client of transfer 0
 * goes away, its Offer expires, its Commit times out, and one of its frames comes with wrong bytes. Transfer 1 meets none of that:
 * it must end by what others do, without a timer.
 *
 * Checked in every reachable state (assertions) and at every end of a run (Monitor):
 *   no stale write   the engine writes a frame only into a block that belongs to the frame's own transfer
 *   complete ack     COMMITTED, and thus CommitAck, implies that all frames were scattered with the right bytes
 *   no credit lost   a slab is there for each header; a link that is up ends with all credits at the sender
 *   every end        each transfer ends on both sides, and P never believes in a commit that D does not have
 *   nothing held     no block, slab, message or frame is left over
 * That each run has an end at all: no cycle exists (`pan -l`).
 *
 * Bugs that the model must catch, by -D: NO_EPOCH_CHECK, NO_FRAME_COUNT, NO_CREDIT_BACK, FREE_ON_LOOP, NO_CHECKSUM.
 */

#ifndef N
#define N 2
#endif
#ifndef F
#define F 2
#endif
#ifndef E
#define E 2
#endif
#ifndef S
#define S 1
#endif
#ifndef B
#define B 1
#endif
#define NOBODY 255
#define DEPTH 10

mtype = { Hello, Welcome, Offer, Reserved, Rejected, Header, Credit, Commit, CommitAck, Cancel };
mtype = { Want, Frame, Spoilt, Committed, Drop };
mtype = { No, New, Offered, Granted, CommitSent, Ended };
mtype = { Open, Done, Aborted };

/* Control streams and transport of each epoch: reliable and in order until the epoch breaks. */
chan to_d[E] = [DEPTH] of { mtype, byte, byte, byte };   /* kind, transfer, ticket, frames */
chan to_p[E] = [DEPTH] of { mtype, byte, byte };         /* kind, transfer, ticket */
chan wire[E] = [S] of { byte, bit };                     /* whose bytes they truly are; whether they are right */
bit broken[E];

/* P: prefill_svc and SenderLink. */
byte p_epoch = 0; bit p_up = 0; byte p_credits = 0;
mtype p_state[N] = No; mtype p_end[N] = Open;
byte p_ticket[N]; byte p_taken[N]; byte p_sent[N];
bit p_failed[N];
byte gathering = NOBODY; byte sending = NOBODY;

/* D: decode_svc and ReceiverLink. A ticket is one of the current epoch; 0 is none. */
byte d_epoch = NOBODY; bit d_retired = 1;
bit d_open[N]; bit d_paired[N]; byte d_pair_epoch[N]; mtype d_end[N] = Open;
byte d_ticket[N]; byte d_next_ticket; byte d_announced[N]; byte d_outstanding[N]; bit d_commit[N];
byte d_slabs[E];
bit d_submitted[N]; bit d_failed[N]; bit d_left[N];
chan announced[E] = [S] of { byte, byte };               /* transfer or NOBODY, ticket */
chan reserved = [N] of { byte };                         /* engine thread to loop */

/* D's engine thread and its pool. */
chan inbox = [DEPTH] of { mtype, byte, byte, byte, byte };    /* kind, transfer, epoch, ticket, whose bytes */
byte owner[B] = NOBODY; byte block_of[N] = NOBODY; bit wanted[N]; byte scattered[N];

/* The gateway. */
bit p_submitted[N]; bit p_left[N]; bit client_left; bit spoilt;

inline send_d(e, kind, t, ticket, n) { assert(nfull(to_d[e])); to_d[e]!kind(t, ticket, n) }
inline send_p(e, kind, t, ticket) { assert(nfull(to_p[e])); to_p[e]!kind(t, ticket) }
inline tell(kind, t, e, ticket, whose) { assert(nfull(inbox)); inbox!kind(t, e, ticket, whose) }

inline p_finish(t, how) { p_state[t] = Ended; p_end[t] = how }

inline p_abort(t) {                                      /* SenderLink._fail: open ones only */
  if
  :: p_state[t] != No && p_state[t] != Ended -> p_finish(t, Aborted); p_failed[t] = 1
  :: else
  fi
}

/* `_commit_if_sent`. */
inline p_commit_if_sent(t) {
  if
  :: p_state[t] == Granted && p_sent[t] == F -> p_state[t] = CommitSent; send_d(p_epoch, Commit, t, p_ticket[t], F)
  :: else
  fi
}

proctype P_loop() {
  byte t, k, i;
  send_d(0, Hello, 0, 0, 0);
end:
  do
  :: atomic { to_p[p_epoch]?Welcome(t, k) -> p_up = 1; i = 0;
       do                                                /* SenderLink.adopt */
       :: i < N && p_state[i] == CommitSent -> send_d(p_epoch, Commit, i, p_ticket[i], F); i++
       :: i < N && p_state[i] != CommitSent -> i++
       :: else -> break
       od; i = 0 }
  :: atomic { to_p[p_epoch]?Credit(t, k) -> p_credits++; assert(p_credits <= S) }
  :: atomic { to_p[p_epoch]?Reserved(t, k) ->
       if
       :: p_state[t] == Offered -> p_state[t] = Granted; p_ticket[t] = k
       :: else
       fi }
  :: atomic { to_p[p_epoch]?CommitAck(t, k) ->
       assert(scattered[t] == F && d_end[t] == Done);
       if
       :: p_state[t] == CommitSent -> p_finish(t, Done)
       :: else -> assert(p_state[t] == Ended)
       fi }
  :: atomic { to_p[p_epoch]?Rejected(t, k) -> p_abort(t) }
  :: atomic { to_p[p_epoch]?Cancel(t, k) ->
       if
       :: p_state[t] == No || p_state[t] == New -> p_finish(t, Aborted); p_failed[t] = 1
       :: else -> p_abort(t)
       fi }
  :: atomic { p_up && p_state[0] == New -> p_state[0] = Offered; send_d(p_epoch, Offer, 0, 0, 0) }
  :: atomic { p_up && p_state[1] == New -> p_state[1] = Offered; send_d(p_epoch, Offer, 1, 0, 0) }
  :: atomic { p_up && p_state[0] == CommitSent ->        /* COMMIT_TIMEOUT_S */
       send_d(p_epoch, Cancel, 0, 0, 0); p_abort(0) }
  :: atomic { broken[p_epoch] -> i = 0;                  /* retire, and open the next epoch */
       do
       :: i < N && (p_state[i] == Offered || p_state[i] == Granted) -> p_abort(i); i++
       :: i < N && !(p_state[i] == Offered || p_state[i] == Granted) -> i++
       :: else -> break
       od; i = 0;
       p_up = 0; p_credits = 0; gathering = NOBODY; sending = NOBODY;
       p_epoch++; send_d(p_epoch, Hello, 0, 0, 0) }
  od
}

inline take(t) { p_credits--; p_taken[t]++; gathering = t }

proctype P_pump() {
  byte t; bit right;
end:
  do
  :: atomic { p_credits > 0 && gathering == NOBODY && sending == NOBODY && p_state[0] == Granted && p_taken[0] < F -> take(0) }
  :: atomic { p_credits > 0 && gathering == NOBODY && sending == NOBODY && p_state[1] == Granted && p_taken[1] < F -> take(1) }
  :: atomic { gathering != NOBODY ->                     /* frame_gathered */
       t = gathering; gathering = NOBODY;
       if
       :: p_state[t] == Granted -> send_d(p_epoch, Header, NOBODY, p_ticket[t], 0); sending = t
       :: else ->
#ifndef NO_CREDIT_BACK
            p_credits++
#else
            skip
#endif
       fi }
  :: atomic { sending != NOBODY && nfull(wire[p_epoch]) -> right = 1;
       if
       :: sending == 0 && !spoilt -> spoilt = 1; right = 0
       :: true
       fi;
       wire[p_epoch]!sending(right); t = sending; sending = NOBODY; right = 0;
       p_sent[t]++; p_commit_if_sent(t) }                /* frame_sent */
  od
}

inline d_finish(t, how) { d_open[t] = 0; d_ticket[t] = 0; d_end[t] = how }

inline d_abort(t) { d_finish(t, Aborted); d_failed[t] = 1 }

inline d_retire() {
  d_retired = 1; d_i = 0;
  do
  :: d_i < N && d_open[d_i] -> d_abort(d_i); d_i++
  :: d_i < N && !d_open[d_i] -> d_i++
  :: else -> break
  od; d_i = 0
}

/* `_complete_if_scattered` */
inline d_complete(t) {
  if
#ifdef NO_FRAME_COUNT
  :: d_commit[t] ->
#else
  :: d_commit[t] && d_outstanding[t] == 0 && d_announced[t] == F ->
#endif
       assert(scattered[t] == F);
       d_finish(t, Done); tell(Committed, t, 0, 0, 0); send_p(d_epoch, CommitAck, t, 0)
  :: else
  fi
}

/* A freed slab is a credit again, unless its epoch is over. */
inline release(e) {
  d_slabs[e]++;
  if
  :: e == d_epoch && !d_retired -> send_p(e, Credit, 0, 0)
  :: else
  fi
}

/* The open transfer of a ticket, or NOBODY. */
inline find(ticket, t) {
  if
  :: d_open[0] && d_ticket[0] == ticket -> t = 0
  :: d_open[1] && d_ticket[1] == ticket -> t = 1
  :: else -> t = NOBODY
  fi
}

inline pair(t) { d_paired[t] = 1; d_pair_epoch[t] = d_epoch; tell(Want, t, 0, 0, 0) }

proctype D_loop() {
  byte t, k, n, d_i;
end:
  do
  :: atomic { d_epoch == NOBODY && nempty(to_d[0]) -> to_d[0]?Hello(t, k, n); d_epoch = 0; goto up }
  :: atomic { d_epoch != NOBODY && d_epoch + 1 < E && nempty(to_d[d_epoch + 1]) ->
       to_d[d_epoch + 1]?Hello(t, k, n);
       if
       :: !d_retired -> d_retire()
       :: else
       fi;
       d_epoch++;
up:    d_retired = 0; d_next_ticket = 1; d_slabs[d_epoch] = S;
       send_p(d_epoch, Welcome, 0, 0); k = 0;
       do
       :: k < S -> send_p(d_epoch, Credit, 0, 0); k++
       :: else -> break
       od; t = 0; k = 0; n = 0 }
  :: atomic { d_epoch != NOBODY && !d_retired && broken[d_epoch] -> d_retire() }
  :: atomic { !d_retired && d_open[0] && !d_paired[0] -> /* RESERVE_TIMEOUT_S */
       d_finish(0, Aborted); send_p(d_epoch, Rejected, 0, 0) }
  :: atomic { reserved?t ->                              /* DecodeRole._reserved */
       if
       :: d_left[t] -> skip
       :: else ->
            if
            :: d_open[t] && d_pair_epoch[t] == d_epoch && !d_retired ->
                 d_ticket[t] = d_next_ticket; d_next_ticket++; send_p(d_epoch, Reserved, t, d_ticket[t])
            :: else -> d_failed[t] = 1
            fi
       fi }
  :: atomic { !d_retired && nempty(to_d[d_epoch]) ->
       if
       :: to_d[d_epoch]?Offer(t, k, n) ->
            if
            :: d_end[t] != Open -> send_p(d_epoch, Rejected, t, 0)
            :: else ->
                 d_open[t] = 1;
                 if
                 :: d_submitted[t] -> pair(t)
                 :: else
                 fi
            fi
       :: to_d[d_epoch]?Header(t, k, n) ->
            assert(0 < k && k < d_next_ticket); assert(d_slabs[d_epoch] > 0);
            d_slabs[d_epoch]--; find(k, t);
            if
            :: t != NOBODY -> assert(!d_commit[t]); d_announced[t]++; d_outstanding[t]++
            :: else
            fi;
            announced[d_epoch]!t(k); t = 0; k = 0
       :: to_d[d_epoch]?Commit(t, k, n) ->
            if
            :: d_open[t] && d_ticket[t] == k -> assert(n == d_announced[t]); d_commit[t] = 1; d_complete(t)
            :: d_open[t] && d_ticket[t] != k -> skip
            :: !d_open[t] && d_end[t] == Done -> send_p(d_epoch, CommitAck, t, 0)
            :: !d_open[t] && d_end[t] != Done -> send_p(d_epoch, Cancel, t, 0)
            fi; n = 0
       :: to_d[d_epoch]?Cancel(t, k, n) ->
            if
            :: d_open[t] -> d_abort(t)
            :: !d_open[t] && d_end[t] == Open -> d_end[t] = Aborted; d_failed[t] = 1
            :: else
            fi
       fi; t = 0; k = 0; n = 0 }
  od
}

/* One thread per epoch. It hands a frame on without the lock, so the epoch may be over by then. */
proctype D_pump(byte e) {
  byte t, k, whose; bit right;
end:
  do
  :: atomic { d_epoch == e && !d_retired && nempty(announced[e]) && nempty(wire[e]) ->
       announced[e]?t(k); wire[e]?whose(right);
       assert(t == NOBODY || t == whose);                /* frames are matched by order */
       if
       :: t == NOBODY || !d_open[t] -> release(e); t = NOBODY
       :: else
       fi }
     atomic {
       if
       :: t != NOBODY && right -> tell(Frame, t, e, k, whose)
       :: t != NOBODY && !right -> tell(Spoilt, t, e, k, whose)
       :: else
       fi; t = 0; k = 0; whose = 0; right = 0 }
  od
}

inline free_block(t) {
  if
  :: block_of[t] != NOBODY -> assert(owner[block_of[t]] == t); owner[block_of[t]] = NOBODY; block_of[t] = NOBODY
  :: else
  fi
}

/* ReceiverLink.may_scatter: the link of the frame's own epoch is asked. */
inline may_scatter(e, ticket, t) {
  find(ticket, t);
#ifndef NO_EPOCH_CHECK
  if
  :: e != d_epoch || d_retired -> t = NOBODY
  :: else
  fi
#endif
}

inline reserve(t) {
  atomic { wanted[t] && owner[0] == NOBODY -> owner[0] = t; block_of[t] = 0; wanted[t] = 0; reserved!t }
}

proctype D_engine() {
  byte t, e, k, whose, found; bit right;
end:
  do
  :: reserve(0)
  :: reserve(1)
#if B > 1
  :: atomic { wanted[0] && owner[1] == NOBODY && owner[0] != NOBODY -> owner[1] = 0; block_of[0] = 1; wanted[0] = 0; reserved!0 }
  :: atomic { wanted[1] && owner[1] == NOBODY && owner[0] != NOBODY -> owner[1] = 1; block_of[1] = 1; wanted[1] = 0; reserved!1 }
#endif
  :: atomic { inbox?Want(t, e, k, whose) -> wanted[t] = 1; t = 0 }
  :: atomic { inbox?Committed(t, e, k, whose) -> t = 0 }
  :: atomic { inbox?Drop(t, e, k, whose) -> wanted[t] = 0; free_block(t); t = 0 }
  :: atomic {
       if
       :: inbox?Frame(t, e, k, whose) -> right = 1
       :: inbox?Spoilt(t, e, k, whose)
       fi;
       may_scatter(e, k, found) };
     /* Here others run: the transfer may end, but its block stays, because this thread frees blocks. */
     atomic {
       if
       :: found != NOBODY ->                             /* that bytes are wrong is known when they lie in the block */
            assert(block_of[found] != NOBODY && owner[block_of[found]] == whose);
            scattered[whose] = scattered[whose] + right
       :: else
       fi;
       release(e);                                       /* frame_scattered */
#ifdef NO_CHECKSUM
       right = 1;
#endif
       if
       :: found != NOBODY && d_open[found] && e == d_epoch && right -> d_outstanding[found]--; d_complete(found)
       :: found != NOBODY && d_open[found] && e == d_epoch && !right -> send_p(e, Cancel, found, 0); d_abort(found)
       :: else
       fi;
       t = 0; e = 0; k = 0; whose = 0; found = 0; right = 0 }
  od
}

/* Submit goes to both workers; a leg that failed, or a client that left, aborts the other; D's request ends. */
proctype Legs(byte t) {
end:
  do
  :: atomic { !p_submitted[t] -> p_submitted[t] = 1;
       if
       :: p_state[t] == Ended -> p_failed[t] = 1
       :: else -> p_state[t] = New
       fi }
  :: atomic { !d_submitted[t] -> d_submitted[t] = 1;
       if
       :: d_end[t] != Open -> d_failed[t] = 1
       :: d_end[t] == Open && d_open[t] -> pair(t)
       :: else
       fi }
  :: atomic { p_submitted[t] && !p_left[t] && (d_failed[t] || (t == 0 && client_left)) -> p_left[t] = 1;
       if
       :: p_state[t] == Ended -> skip
       :: p_state[t] == New -> p_finish(t, Aborted);
            if :: p_up -> send_d(p_epoch, Cancel, t, 0, 0) :: else fi
       :: else -> p_finish(t, Aborted);
            if :: p_up -> send_d(p_epoch, Cancel, t, 0, 0) :: else fi
       fi }
  :: atomic { d_submitted[t] && !d_left[t] && (p_failed[t] || d_failed[t] || d_end[t] == Done || (t == 0 && client_left)) ->
       d_left[t] = 1;
       if
       :: d_end[t] == Open && d_open[t] && !d_retired -> d_finish(t, Aborted); send_p(d_epoch, Cancel, t, 0)
       :: d_end[t] == Open && !(d_open[t] && !d_retired) -> d_finish(t, Aborted)
       :: else
       fi;
#ifdef FREE_ON_LOOP
       free_block(t); wanted[t] = 0;
#endif
       tell(Drop, t, 0, 0, 0) }
  od
}

proctype Client() { client_left = 1 }

/* All epochs but the last may break, at any moment. */
proctype Network() {
  byte e = 0;
end:
  do
  :: atomic { e + 1 < E -> broken[e] = 1; e++ }
  od
}

proctype Monitor() {
  byte t = 0;
  atomic { timeout ->
    do
    :: t < N -> assert(p_end[t] != Open && d_end[t] != Open);
         assert(p_end[t] != Done || d_end[t] == Done);
         assert(block_of[t] == NOBODY && !wanted[t]); t++
    :: else -> break
    od;
    assert(owner[0] == NOBODY && owner[B - 1] == NOBODY);
    assert(empty(inbox) && empty(reserved) && empty(to_d[p_epoch]) && empty(to_p[p_epoch]) && empty(wire[p_epoch]));
    assert(p_up && d_epoch == p_epoch && !d_retired);
    assert(p_credits == S && d_slabs[d_epoch] == S)
  }
}

init { atomic {
  run P_loop(); run P_pump(); run D_loop(); run D_pump(0); run D_pump(1); run D_engine(); run Legs(0); run Legs(1); run Client(); run Network(); run Monitor()
} }
