//! A gate that one holds closed while the others stay out: of a VM's guest, by its vCPUs, and of
//! the guests of a core, by its threads.
//!
//! All is in one word, so all members see one order of what happens to it:
//!
//! | member | step | then |
//! |---|---|---|
//! | any, before VM entry | [`Gate::enter`] | true: it is inside and may go on. False: it is held: it stays out until the holder wakes it, and enters again |
//! | inside, after a VM exit | [`Gate::wants_out`] | true: [`Gate::leave`], then [`Gate::enter`], which holds it |
//! | inside, wants to be alone | [`Gate::close`] | `Some(others)`: it is the holder, and kicks the others out of the guest. `None`: another one is; it leaves and enters, as above |
//! | holder | [`Gate::is_alone`] until true | it does what the others must not see, at most one instruction of the guest |
//! | holder | [`Gate::open`] | it wakes those that were held |
//!
//! *Who waits for whom*: the holder waits for those inside, and each of these leaves at its next
//! VM exit, which the kick brings about, without waiting for anybody. Those who are held wait for
//! the holder. The holder waits for nobody once it is alone. So there is no circle, provided that
//! the callers keep four rules:
//!
//! 1. Whoever is inside waits for nobody, apart from the holder in [`Gate::is_alone`], and from a
//!    vCPU whose thread is held at its core's gate, which opens soon (4). A closer that comes second
//!    leaves first.
//! 2. Only [`Gate::enter`] notes who is held. Whoever leaves since it is wanted out, or comes second
//!    in [`Gate::close`], has to enter again before it sleeps, or nobody will wake it. Before it
//!    sleeps it looks whether it was woken; that somebody holds the gate says nothing, since that
//!    may be a later holder, who does not know of it.
//! 3. The holder opens the gate before it gives up its CPU and before its VM ends.
//! 4. With two kinds of gates there is an order: whoever holds a core's gate does not close, and
//!    does not wait for, a VM's gate. Then a core's gate always opens soon, and a VM's holder may
//!    wait for it.
//!
//! *Bounds*: nobody enters a closed gate but the holder, so the number of those that the holder
//! waits for only falls, one VM exit each. A compare-and-exchange fails only because another
//! member got its step done, and a member has few steps between two runs of its guest. Nobody is
//! served in turn: of those that want to close it, whoever comes first is next.

#[cfg(not(loom))]
use core::sync::atomic::AtomicU64;
use core::sync::atomic::Ordering::{AcqRel, Acquire, Release};
#[cfg(loom)]
use loom::sync::atomic::AtomicU64;

/// How many members a gate has at most: 0 to 15.
pub const MEMBERS: usize = 16;

/// Bits 15:0: who is inside.
const INSIDE: u64 = 0xffff;
/// Bits 31:16: who was held.
const HELD_SHIFT: u32 = 16;
/// Bits 39:32: the holder's number plus 1; 0 while the gate is open.
const HOLDER_SHIFT: u32 = 32;
const _: () = assert!(MEMBERS as u32 == HELD_SHIFT && 2 * HELD_SHIFT == HOLDER_SHIFT);

/// The gate.
pub struct Gate(AtomicU64);

/// The bit of `member` in a mask of members.
const fn bit(member: u32) -> u64 {
    assert!(member < MEMBERS as u32);
    1 << member
}

/// Who holds the gate closed.
const fn holder(word: u64) -> Option<u32> {
    ((word >> HOLDER_SHIFT) as u32).checked_sub(1)
}

/// Those inside, without `member`.
const fn others(word: u64, member: u32) -> u16 {
    (word & INSIDE & !bit(member)) as u16
}

impl Gate {
    /// Open, with nobody inside.
    #[cfg(not(loom))]
    pub const fn new() -> Self {
        Self(AtomicU64::new(0))
    }

    /// Open, with nobody inside.
    #[cfg(loom)]
    pub fn new() -> Self {
        Self(AtomicU64::new(0))
    }

    /// `member` is about to enter the guest. False: another member holds the gate closed;
    /// `member` is noted as held and must not enter, and [`Self::open`] names it to be woken.
    /// The holder itself may enter.
    ///
    /// Whoever enters sees what all earlier holders did.
    #[inline]
    pub fn enter(&self, member: u32) -> bool {
        let enters = |word| holder(word).is_none_or(|holder| holder == member);
        let step = |word| {
            let mark = if enters(word) { bit(member) } else { bit(member) << HELD_SHIFT };
            Some(word | mark)
        };
        match self.0.fetch_update(AcqRel, Acquire, step) {
            Ok(before) | Err(before) => enters(before),
        }
    }

    /// `member` is out of the guest. Whether it holds the gate does not change.
    #[inline]
    pub fn leave(&self, member: u32) {
        // Release: the holder that finds itself alone sees what this member did.
        let before = self.0.fetch_and(!bit(member), Release);
        debug_assert!(before & bit(member) != 0, "member {member} leaves and was not inside");
    }

    /// `member`, which is inside, closes the gate. `Some(others)`: a mask of those that are inside
    /// and must be kicked; 0 if there are none. `None`: another one holds the gate; `member` must
    /// leave and enter again, and will be held.
    pub fn close(&self, member: u32) -> Option<u16> {
        let step = |word| {
            debug_assert!(word & bit(member) != 0, "member {member} closes and is not inside");
            holder(word).is_none().then_some(word | u64::from(member + 1) << HOLDER_SHIFT)
        };
        self.0.fetch_update(AcqRel, Acquire, step).ok().map(|before| others(before, member))
    }

    /// Whether all others are out. The holder asks until this is true; then it sees what they did.
    pub fn is_alone(&self, member: u32) -> bool {
        let word = self.0.load(Acquire);
        debug_assert!(holder(word) == Some(member), "member {member} does not hold the gate");
        others(word, member) == 0
    }

    /// Whether `member`, which is inside, is to leave because another one holds the gate.
    #[inline]
    pub fn wants_out(&self, member: u32) -> bool {
        // As a rule nobody holds it.
        let word = self.0.load(Acquire);
        word >> HOLDER_SHIFT != 0 && holder(word) != Some(member)
    }

    /// The holder lets the others go on. A mask of those that were held, to be woken.
    pub fn open(&self, member: u32) -> u16 {
        let before = self.0.fetch_and(INSIDE, AcqRel);
        debug_assert!(holder(before) == Some(member), "member {member} does not hold the gate");
        (before >> HELD_SHIFT) as u16
    }

    /// Whether `member` holds the gate.
    #[inline]
    pub fn is_held_by(&self, member: u32) -> bool {
        holder(self.0.load(Acquire)) == Some(member)
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn one_holds_and_the_others_stay_out() {
        let gate = Gate::new();
        assert!(gate.enter(0) && gate.enter(3) && gate.enter(15));
        assert_eq!(gate.close(3), Some(1 << 0 | 1 << 15));
        assert!(gate.is_held_by(3) && !gate.is_held_by(0));
        assert!(gate.wants_out(0) && !gate.wants_out(3));
        assert_eq!(gate.close(0), None);
        gate.leave(0);
        assert!(!gate.is_alone(3));
        gate.leave(15);
        assert!(gate.is_alone(3));
        assert!(!gate.enter(0) && !gate.enter(0) && !gate.enter(7));
        // The holder may go out and in.
        gate.leave(3);
        assert!(gate.enter(3) && gate.is_alone(3));
        assert_eq!(gate.open(3), 1 << 0 | 1 << 7);
        assert!(!gate.is_held_by(3) && !gate.wants_out(3));
        // It is still inside.
        assert!(gate.enter(0));
        assert_eq!(gate.close(0), Some(1 << 3));
        assert_eq!(gate.open(0), 0);
    }

    #[test]
    fn every_member_has_its_own_bits() {
        let gate = Gate::new();
        for member in 0..MEMBERS as u32 {
            assert!(gate.enter(member));
            assert_eq!(gate.close(member), Some((1 << member) - 1));
            assert!((0..MEMBERS as u32).all(|m| gate.is_held_by(m) == (m == member)));
            assert!((member + 1..MEMBERS as u32).all(|other| !gate.enter(other)));
            assert_eq!(gate.open(member), !(((1u32 << member) * 2 - 1) as u16));
        }
    }

    #[test]
    #[should_panic(expected = "does not hold")]
    fn only_the_holder_opens() {
        let gate = Gate::new();
        assert!(gate.enter(0) && gate.close(0).is_some());
        gate.open(1);
    }
}

#[cfg(all(test, loom))]
pub mod tests {
    use super::*;
    use loom::sync::atomic::{AtomicBool, AtomicU32, Ordering::Relaxed};
    use loom::thread;
    use std::sync::{Arc, OnceLock};

    /// Runs `model` in all interleavings, or in those where threads lose the CPU against their
    /// will `preemptions` times at most. A model that hangs fails, since its steps are counted.
    pub fn explore(preemptions: Option<usize>, model: impl Fn() + Sync + Send + 'static) {
        let count = Arc::new(std::sync::atomic::AtomicU64::new(0));
        let mut builder = loom::model::Builder::new();
        builder.preemption_bound = preemptions;
        let counter = count.clone();
        builder.check(move || {
            counter.fetch_add(1, Relaxed);
            model();
        });
        let name = thread_name();
        println!("{name}: {} interleavings", count.load(Relaxed));
    }

    fn thread_name() -> String {
        std::thread::current().name().unwrap_or("?").into()
    }

    /// Runs `member` for each member of a team: the last one in this thread, the others in threads
    /// of their own. What is to hold at the end is checked where `T` is dropped.
    pub fn run<T: 'static>(team: T, members: usize, member: fn(&Team<T>, usize)) {
        let team = Arc::new(Team { shared: team, threads: OnceLock::new() });
        let start = |index| {
            let team = team.clone();
            thread::spawn(move || member(&team, index)).thread().clone()
        };
        let mut threads: Vec<_> = (0..members - 1).map(start).collect();
        threads.push(thread::current());
        // No other thread has run so far.
        team.threads.set(threads).unwrap();
        member(&team, members - 1);
    }

    /// What the members share, and how one wakes another.
    pub struct Team<T> {
        shared: T,
        threads: OnceLock<Vec<thread::Thread>>,
    }

    impl<T> core::ops::Deref for Team<T> {
        type Target = T;

        fn deref(&self) -> &T {
            &self.shared
        }
    }

    impl<T> Team<T> {
        /// Counts a message to `member` and wakes it.
        pub fn send(&self, member: usize, messages: &AtomicU32) {
            messages.fetch_add(1, Release);
            self.threads.get().unwrap()[member].unpark();
        }
    }

    /// Waits until there are more than `received` messages; says how many there are. What it waits
    /// for is not polled, so that an order in which it never comes is found as a deadlock.
    pub fn receive(messages: &AtomicU32, received: u32) -> u32 {
        loop {
            let sent = messages.load(Acquire);
            if sent > received {
                return sent;
            }
            thread::park();
        }
    }

    /// A VM whose guest shows where the gate fails: nothing but the gate orders what it does.
    struct Vm<const N: usize> {
        gate: Gate,
        /// Who is in the guest.
        guest: [AtomicBool; N],
        /// Not 0 while the holder is alone.
        secret: AtomicU32,
        /// How often each member was woken, and kicked.
        woken: [AtomicU32; N],
        kicked: [AtomicU32; N],
        /// How many told the last member that they are inside.
        arrived: AtomicU32,
    }

    fn members(mask: u16) -> impl Iterator<Item = usize> {
        (0..MEMBERS).filter(move |member| mask >> member & 1 != 0)
    }

    impl<const N: usize> Vm<N> {
        fn new() -> Self {
            let counters = || core::array::from_fn(|_| AtomicU32::new(0));
            Self {
                gate: Gate::new(),
                guest: core::array::from_fn(|_| AtomicBool::new(false)),
                secret: AtomicU32::new(0),
                woken: counters(),
                kicked: counters(),
                arrived: AtomicU32::new(0),
            }
        }

        fn enter(&self, member: usize, woken: &mut u32) {
            while !self.gate.enter(member as u32) {
                *woken = receive(&self.woken[member], *woken);
            }
            self.guest[member].store(true, Relaxed);
            assert_eq!(self.secret.load(Relaxed), 0, "member {member} is in with the holder");
        }

        fn leave(&self, member: usize) {
            assert_eq!(self.secret.load(Relaxed), 0, "member {member} is in with the holder");
            self.guest[member].store(false, Relaxed);
            self.gate.leave(member as u32);
        }
    }

    impl<const N: usize> Drop for Vm<N> {
        fn drop(&mut self) {
            let word = self.gate.0.fetch_or(0, Relaxed);
            assert_eq!(word, 0, "somebody is inside or held, or holds the gate");
        }
    }

    /// Enters, is alone for a moment, and leaves.
    fn close<const N: usize>(vm: &Team<Vm<N>>, member: usize) {
        let mut woken = 0;
        vm.enter(member, &mut woken);
        let inside = loop {
            if let Some(inside) = vm.gate.close(member as u32) {
                break inside;
            }
            vm.leave(member);
            vm.enter(member, &mut woken);
        };
        members(inside).for_each(|other| vm.send(other, &vm.kicked[other]));
        while !vm.gate.is_alone(member as u32) {
            thread::yield_now();
        }
        vm.secret.store(1, Relaxed);
        for (other, guest) in vm.guest.iter().enumerate() {
            assert_eq!(guest.load(Relaxed), other == member, "member {other} is not out");
        }
        vm.secret.store(0, Relaxed);
        members(vm.gate.open(member as u32)).for_each(|other| vm.send(other, &vm.woken[other]));
        vm.leave(member);
    }

    /// Enters and leaves.
    fn visit<const N: usize>(vm: &Team<Vm<N>>, member: usize) {
        vm.enter(member, &mut 0);
        vm.leave(member);
    }

    /// Enters, tells the last member, stays until it is kicked, and leaves.
    fn stay<const N: usize>(vm: &Team<Vm<N>>, member: usize) {
        vm.enter(member, &mut 0);
        vm.send(N - 1, &vm.arrived);
        let mut kicked = 0;
        while !vm.gate.wants_out(member as u32) {
            kicked = receive(&vm.kicked[member], kicked);
        }
        vm.leave(member);
    }

    #[test]
    fn two_that_close_at_once() {
        explore(None, || run(Vm::<2>::new(), 2, close));
    }

    #[test]
    fn one_closes_and_one_comes_twice() {
        explore(None, || {
            run(Vm::<2>::new(), 2, |vm, member| match member {
                0 => close(vm, 0),
                _ => (0..2).for_each(|_| visit(vm, 1)),
            });
        });
    }

    #[test]
    fn who_stays_inside_is_kicked() {
        explore(Some(2), || {
            run(Vm::<3>::new(), 3, |vm, member| match member {
                0 | 1 => stay(vm, member),
                _ => {
                    receive(&vm.arrived, 1);
                    close(vm, 2);
                }
            });
        });
    }

    #[test]
    fn two_close_and_one_comes() {
        explore(Some(2), || {
            run(Vm::<3>::new(), 3, |vm, member| match member {
                0 | 1 => close(vm, member),
                _ => visit(vm, 2),
            });
        });
    }

    #[test]
    fn three_that_close_at_once() {
        explore(Some(2), || run(Vm::<3>::new(), 3, close));
    }
}
