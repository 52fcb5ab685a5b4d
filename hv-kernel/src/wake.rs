//! Where a vCPU is, and how it is woken without a wake-up getting lost.
//!
//! Somebody posts something for a vCPU (an interrupt, an order to stop) and calls
//! [`Whereabouts::notify`]. The vCPU's owner, the CPU that it is on, says where the vCPU is and
//! then looks at what was posted. Each of the two writes one thing and reads the other's (Dekker's
//! pattern), which needs more than acquire and release: without a full barrier between write and
//! read, each CPU's write may wait in its store buffer while both read the old values, and nobody
//! acts. So both have a sequentially consistent fence in between: `notify` before it reads where
//! the vCPU is, [`Whereabouts::set_running`] and [`Whereabouts::set_parked`] after they have
//! written it. One of the fences is first. If it is that of `notify`, the owner sees what was
//! posted. If it is the owner's, `notify` sees where the vCPU is. What is posted may be written
//! and read with any ordering.
//!
//! | where it was | `notify` | who sees what was posted |
//! |---|---|---|
//! | queued | nothing | the owner, after `set_running` |
//! | running | a kick | the guest loop, after the exit that the kick brings about |
//! | parked | it becomes queued, one message | the owner, after it gets the message and `set_running` |
//! | gone | nothing | nobody |

use core::sync::atomic::Ordering::{AcqRel, Acquire, Release, SeqCst};
#[cfg(not(loom))]
use core::sync::atomic::{AtomicU32, fence};
#[cfg(loom)]
use loom::sync::atomic::{AtomicU32, fence};

/// Bits 1:0: what the vCPU does. Bits 31:2: on which CPU, where that matters.
const QUEUED: u32 = 0;
const RUNNING: u32 = 1;
const PARKED: u32 = 2;
const GONE: u32 = 3;
const CPU_SHIFT: u32 = 2;

const fn on(cpu: u32, state: u32) -> u32 {
    assert!(cpu <= u32::MAX >> CPU_SHIFT);
    cpu << CPU_SHIFT | state
}

/// Where a vCPU is.
pub struct Whereabouts(AtomicU32);

/// What there is to do for whoever has posted something.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Notify {
    /// Nothing: the vCPU looks before it runs again.
    Nothing,
    /// Kick this CPU out of the guest, by NMI.
    Kick(u32),
    /// Send this CPU the message that the vCPU, which was parked there, is queued.
    Wake(u32),
}

impl Whereabouts {
    /// Queued.
    #[cfg(not(loom))]
    pub const fn new() -> Self {
        Self(AtomicU32::new(QUEUED))
    }

    /// Queued.
    #[cfg(loom)]
    pub fn new() -> Self {
        Self(AtomicU32::new(QUEUED))
    }

    /// By its owner, before it looks at what was posted and enters the guest.
    pub fn set_running(&self, cpu: u32) {
        self.0.store(on(cpu, RUNNING), Release);
        fence(SeqCst);
    }

    /// By its owner: it waits for a CPU, and whoever runs it will look at what was posted.
    pub fn set_queued(&self) {
        self.0.store(QUEUED, Release);
    }

    /// By its owner: it sleeps on `cpu`. The owner must look at what was posted after this, and
    /// call [`Self::unpark`] if there is something.
    pub fn set_parked(&self, cpu: u32) {
        self.0.store(on(cpu, PARKED), Release);
        fence(SeqCst);
    }

    /// By its owner: something was posted, or its timer is due. True: it is queued now. False:
    /// somebody else has queued it, and that one's message is on its way; the owner waits for it.
    #[must_use]
    pub fn unpark(&self, cpu: u32) -> bool {
        self.0.compare_exchange(on(cpu, PARKED), QUEUED, AcqRel, Acquire).is_ok()
    }

    /// By its owner, for good: nobody wakes it any more. A message that was on its way arrives.
    pub fn set_gone(&self) {
        self.0.store(GONE, Release);
    }

    /// By whoever has posted something. A parked vCPU becomes queued, and exactly one of those
    /// who post gets [`Notify::Wake`] for it.
    ///
    /// There is no loop: if the exchange fails, the vCPU was parked when its owner or another
    /// one's `notify` took it from there, after this one's fence. So its next `set_running` or
    /// `set_parked` comes after this fence, too, and its owner sees what was posted.
    #[must_use]
    pub fn notify(&self) -> Notify {
        fence(SeqCst);
        let found = self.0.load(Acquire);
        let cpu = found >> CPU_SHIFT;
        match found & (on(1, 0) - 1) {
            RUNNING => Notify::Kick(cpu),
            PARKED if self.0.compare_exchange(found, QUEUED, AcqRel, Acquire).is_ok() => {
                Notify::Wake(cpu)
            }
            _ => Notify::Nothing,
        }
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn whoever_posts_does_what_is_needed() {
        let whereabouts = Whereabouts::new();
        assert_eq!(whereabouts.notify(), Notify::Nothing);
        whereabouts.set_running(5);
        assert_eq!(whereabouts.notify(), Notify::Kick(5));
        assert_eq!(whereabouts.notify(), Notify::Kick(5));
        whereabouts.set_queued();
        assert_eq!(whereabouts.notify(), Notify::Nothing);
        whereabouts.set_parked(63);
        assert_eq!(whereabouts.notify(), Notify::Wake(63));
        assert_eq!(whereabouts.notify(), Notify::Nothing);
        whereabouts.set_gone();
        assert_eq!(whereabouts.notify(), Notify::Nothing);
    }

    #[test]
    fn one_of_two_queues_a_parked_vcpu() {
        let whereabouts = Whereabouts::new();
        whereabouts.set_parked(0);
        assert!(whereabouts.unpark(0));
        assert!(!whereabouts.unpark(0));
        assert_eq!(whereabouts.notify(), Notify::Nothing);
        whereabouts.set_parked(0);
        assert_eq!(whereabouts.notify(), Notify::Wake(0));
        assert!(!whereabouts.unpark(0));
    }
}

#[cfg(all(test, loom))]
mod tests {
    use super::*;
    use crate::gate::Gate;
    use crate::gate::tests::{Team, explore, receive, run};
    use loom::sync::atomic::{AtomicBool, AtomicU32 as Count, Ordering::Relaxed};
    use loom::thread;

    /// A vCPU, the last member of the team; the others post something for it.
    struct Vcpu {
        whereabouts: Whereabouts,
        posted: [AtomicBool; 2],
        gate: Gate,
        /// How often each CPU was kicked.
        kicks: [Count; 3],
        /// How many messages there are that it was woken, and how many its owner got.
        wakes: Count,
        received: Count,
    }

    /// The CPU on which it parks.
    const HOME: u32 = 1;

    impl Vcpu {
        fn new() -> Self {
            Self {
                whereabouts: Whereabouts::new(),
                posted: [AtomicBool::new(false), AtomicBool::new(false)],
                gate: Gate::new(),
                kicks: [Count::new(0), Count::new(0), Count::new(0)],
                wakes: Count::new(0),
                received: Count::new(0),
            }
        }

        fn posted(&self) -> [bool; 2] {
            [0, 1].map(|index: usize| self.posted[index].load(Relaxed))
        }

        /// The vCPU was parked: gets the message that it is queued.
        fn receive_wake(&self) {
            let before = self.received.fetch_add(1, Relaxed);
            assert_eq!(receive(&self.wakes, before), before + 1, "more than one message");
        }
    }

    impl Drop for Vcpu {
        fn drop(&mut self) {
            let [wakes, received] = [&self.wakes, &self.received].map(|n| n.fetch_or(0, Relaxed));
            assert_eq!(wakes, received, "a message for a vCPU that was not parked");
        }
    }

    fn notify(vcpu: &Team<Vcpu>, member: usize) {
        match vcpu.whereabouts.notify() {
            Notify::Nothing => {}
            Notify::Kick(cpu) => vcpu.send(member, &vcpu.kicks[cpu as usize]),
            Notify::Wake(cpu) => {
                assert_eq!(cpu, HOME);
                vcpu.send(member, &vcpu.wakes);
            }
        }
    }

    fn post(vcpu: &Team<Vcpu>, poster: usize, member: usize) {
        vcpu.posted[poster].store(true, Relaxed);
        notify(vcpu, member);
    }

    /// Runs and parks until `expected` is posted.
    fn run_and_park(vcpu: &Vcpu, expected: [bool; 2]) {
        loop {
            vcpu.whereabouts.set_running(HOME);
            let seen = vcpu.posted();
            if seen == expected {
                break;
            }
            vcpu.whereabouts.set_parked(HOME);
            if vcpu.posted() == seen || !vcpu.whereabouts.unpark(HOME) {
                vcpu.receive_wake();
            }
        }
        vcpu.whereabouts.set_gone();
    }

    /// Runs on `cpu` until `expected` is posted, in the guest without looking.
    fn run_in_guest(vcpu: &Vcpu, cpu: u32, expected: [bool; 2]) {
        vcpu.whereabouts.set_running(cpu);
        let mut kicks = 0;
        while vcpu.posted() != expected {
            kicks = receive(&vcpu.kicks[cpu as usize], kicks);
        }
        vcpu.whereabouts.set_gone();
    }

    #[test]
    fn a_parked_vcpu_is_woken() {
        explore(None, || {
            run(Vcpu::new(), 2, |vcpu, member| match member {
                0 => post(vcpu, 0, 1),
                _ => run_and_park(vcpu, [true, false]),
            });
        });
    }

    #[test]
    fn a_parked_vcpu_is_woken_once_by_two() {
        explore(Some(3), || {
            run(Vcpu::new(), 3, |vcpu, member| match member {
                0 | 1 => post(vcpu, member, 2),
                _ => run_and_park(vcpu, [true, true]),
            });
        });
    }

    #[test]
    fn a_running_vcpu_is_kicked() {
        explore(None, || {
            run(Vcpu::new(), 3, |vcpu, member| match member {
                0 | 1 => post(vcpu, member, 2),
                _ => run_in_guest(vcpu, 0, [true, true]),
            });
        });
    }

    #[test]
    fn a_vcpu_that_moves_is_kicked_where_it_is() {
        explore(None, || {
            run(Vcpu::new(), 2, |vcpu, member| match member {
                0 => post(vcpu, 0, 1),
                _ => {
                    vcpu.whereabouts.set_running(0);
                    vcpu.whereabouts.set_queued();
                    run_in_guest(vcpu, 2, [true, false]);
                }
            });
        });
    }

    #[test]
    fn a_timer_and_a_post_queue_a_parked_vcpu_once() {
        explore(None, || {
            run(Vcpu::new(), 2, |vcpu, member| match member {
                0 => post(vcpu, 0, 1),
                _ => {
                    vcpu.whereabouts.set_parked(HOME);
                    if !vcpu.whereabouts.unpark(HOME) {
                        vcpu.receive_wake();
                    }
                    run_in_guest(vcpu, 0, [true, false]);
                }
            });
        });
    }

    /// Two hold the gate, one after the other; a vCPU that is held parks. It comes twice.
    #[test]
    fn a_vcpu_that_is_held_parks_and_is_woken() {
        explore(Some(3), || {
            run(Vcpu::new(), 2, |vcpu, member| match member {
                0 => [0, 2].into_iter().for_each(|holder| hold(vcpu, holder)),
                _ => (0..2).for_each(|_| visit(vcpu)),
            });
        });
    }

    fn hold(vcpu: &Team<Vcpu>, holder: u32) {
        assert!(vcpu.gate.enter(holder) && vcpu.gate.close(holder).is_some());
        while !vcpu.gate.is_alone(holder) {
            thread::yield_now();
        }
        if vcpu.gate.open(holder) & 1 << 1 != 0 {
            vcpu.posted[0].swap(true, Relaxed);
            notify(vcpu, 1);
        }
        vcpu.gate.leave(holder);
    }

    fn visit(vcpu: &Vcpu) {
        loop {
            vcpu.whereabouts.set_running(HOME);
            if vcpu.gate.enter(1) {
                break;
            }
            vcpu.whereabouts.set_parked(HOME);
            if !vcpu.posted[0].load(Relaxed) || !vcpu.whereabouts.unpark(HOME) {
                vcpu.receive_wake();
            }
            thread::yield_now();
        }
        // The guest loop takes what was posted.
        vcpu.posted[0].swap(false, Relaxed);
        vcpu.gate.leave(1);
        vcpu.whereabouts.set_queued();
    }
}
