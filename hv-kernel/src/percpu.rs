//! What others may see of a CPU: found through GS by the CPU itself, and by its index by others.

use alloc::boxed::Box;
use core::arch::asm;
use core::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use spin::Once;
use vmx::instruction::{InvEpt, expire_preemption_timer, invept, now};
use x86_64::VirtAddr;
use x86_64::instructions::{hlt, interrupts};
use x86_64::registers::model_specific::GsBase;

use crate::events::Stamp;
use crate::gate::Gate;
use crate::inbox::Inbox;
use crate::trail::Trail;
use crate::x86::apic::{Ipi, LocalApic};

/// The most CPUs that are used: a set of them fits into a `u64`.
pub const MAX_CPUS: usize = 64;

/// What the SMT threads of a core share.
pub struct Core {
    /// Its number: the CPUs' APIC ID without the thread's part.
    pub id: u32,
    /// The real bit.
    pub sld: sld::Core,
    /// Lets one thread's guest run alone for one instruction. Members are threads.
    pub gate: Gate,
}

/// A CPU. Everything here can be used by any CPU.
#[repr(C)]
pub struct PerCpu {
    /// Its own address, for [`this`]: GS points here.
    address: u64,
    /// Its index, from 0: the boot CPU's.
    pub index: u32,
    /// Its APIC ID.
    pub apic_id: u32,
    /// Its core.
    pub core: &'static Core,
    /// Which of its core's threads it is, from 0.
    pub thread: u32,
    /// Set by every NMI. See [`vmx::vcpu::HostState::kicked`].
    pub kicked: AtomicBool,
    /// It is in VMX root operation when its hypervisor code runs.
    pub in_vmx: AtomicBool,
    /// The last exits.
    pub trail: Trail,
    /// What other CPUs have sent it.
    pub inbox: Inbox,
    /// The virtual time of the task that it runs, for balancing; the highest while it has none.
    pub front: AtomicU64,
    /// NMIs so far.
    nmis: AtomicU64,
    /// Kicks that were sent to it so far.
    kicks: AtomicU64,
    /// Those of them that were sent when it took its last NMI that was a kick, and when that was.
    kicks_taken: AtomicU64,
    last_kick: AtomicU64,
    /// What its handlers have found, and cannot tell of themselves.
    pub notices: Notices,
    /// Events so far. Only the CPU itself counts.
    events: AtomicU64,
    /// Orders to drop all translations derived from EPT, and how many of them are carried out.
    flushes_wanted: AtomicU64,
    flushes_done: AtomicU64,
}

const _: () = assert!(core::mem::offset_of!(PerCpu, address) == 0);

/// How long after a kick another one may come that was sent before it, in ticks of the TSC. It waits for
/// the first one's handler only, unless system management gets between the two.
const LATE_KICK: u64 = 1 << 26;

/// What handlers that may not wait for a lock have found.
#[derive(Debug, Default)]
pub struct Notices {
    /// There is something.
    any: AtomicBool,
    /// NMIs that nobody here has sent, so far.
    unknown_nmis: AtomicU64,
    /// A machine check came that was another CPU's.
    machine_check: AtomicBool,
}

impl Notices {
    fn unknown_nmi(&self) {
        self.unknown_nmis.fetch_add(1, Ordering::Relaxed);
        self.any.store(true, Ordering::Release);
    }

    /// A machine check that was another CPU's.
    pub fn machine_check(&self) {
        self.machine_check.store(true, Ordering::Relaxed);
        self.any.store(true, Ordering::Release);
    }

    /// Whether there is something to tell.
    #[inline]
    pub fn is_any(&self) -> bool {
        self.any.load(Ordering::Relaxed)
    }

    /// What there is to tell: unknown NMIs so far, and whether there was a machine check.
    pub fn take(&self) -> (u64, bool) {
        self.any.store(false, Ordering::Relaxed);
        let nmis = self.unknown_nmis.load(Ordering::Acquire);
        (nmis, self.machine_check.swap(false, Ordering::Acquire))
    }
}

/// All CPUs that have come online.
static CPUS: [Once<&'static PerCpu>; MAX_CPUS] = [const { Once::new() }; MAX_CPUS];

/// Those that are online: they take NMIs in VMX operation.
static ONLINE: AtomicU64 = AtomicU64::new(0);

impl PerCpu {
    /// A CPU that is not online. It is never freed.
    pub fn new(index: u32, apic_id: u32, core: &'static Core, thread: u32) -> &'static Self {
        let cpu = Box::leak(Box::new(Self {
            address: 0,
            index,
            apic_id,
            core,
            thread,
            kicked: AtomicBool::new(false),
            in_vmx: AtomicBool::new(false),
            trail: Trail::new(),
            inbox: Inbox::new(),
            front: AtomicU64::new(u64::MAX),
            nmis: AtomicU64::new(0),
            kicks: AtomicU64::new(0),
            kicks_taken: AtomicU64::new(0),
            last_kick: AtomicU64::new(0),
            notices: Notices::default(),
            events: AtomicU64::new(0),
            flushes_wanted: AtomicU64::new(0),
            flushes_done: AtomicU64::new(0),
        }));
        cpu.address = &raw const *cpu as u64;
        cpu
    }

    /// Makes it the CPU that executes.
    pub fn install(&'static self) {
        // GS is used for nothing else: guests have their own base in the VMCS.
        GsBase::write(VirtAddr::new(self.address));
    }

    /// As a bit in a set of CPUs.
    pub const fn bit(&self) -> u64 {
        1 << self.index
    }

    /// From now on it is known under its index, and one of those that are kicked and that flush.
    pub fn set_online(&'static self) {
        CPUS[self.index as usize].call_once(|| self);
        self.in_vmx.store(true, Ordering::Relaxed);
        ONLINE.fetch_or(self.bit(), Ordering::SeqCst);
    }

    /// It will run no guest any more.
    pub fn set_offline(&self) {
        ONLINE.fetch_and(!self.bit(), Ordering::SeqCst);
        self.in_vmx.store(false, Ordering::Relaxed);
    }

    /// Kicks it by NMI: out of its guest, or out of its sleep.
    pub fn kick(&self, own: LocalApic) {
        self.kicks.fetch_add(1, Ordering::Relaxed);
        own.send(self.apic_id, Ipi::Nmi);
    }

    /// Now and here, for this CPU's next event; called by itself only.
    #[inline]
    pub fn stamp(&self) -> Stamp {
        let seq = self.events.load(Ordering::Relaxed);
        self.events.store(seq + 1, Ordering::Relaxed);
        Stamp { tsc: now(), cpu: self.index, seq }
    }

    /// An NMI came, in the guest or in the hypervisor. Takes no lock, waits for nothing.
    pub fn on_nmi(&self) {
        self.nmis.fetch_add(1, Ordering::Relaxed);
        self.judge_nmi();
        self.kicked.store(true, Ordering::Relaxed);
        if self.in_vmx.load(Ordering::Relaxed) {
            // SAFETY: `in_vmx` says so.
            unsafe { expire_preemption_timer() };
            self.flush_if_wanted();
        }
    }

    /// Whether the NMI that has come is a kick.
    ///
    /// Kicks that come close together are one NMI, so they cannot be counted off. An NMI is a kick
    /// if one was sent since the last, or if that was not long ago: two may have been on their way,
    /// and one waits while the other is handled. So a kick is never taken for something else; an
    /// NMI of the platform may be for a kick.
    fn judge_nmi(&self) {
        let (sent, now) = (self.kicks.load(Ordering::Relaxed), now());
        if self.kicks_taken.swap(sent, Ordering::Relaxed) != sent {
            self.last_kick.store(now, Ordering::Relaxed);
        } else if sent == 0 || now.wrapping_sub(self.last_kick.load(Ordering::Relaxed)) > LATE_KICK
        {
            self.notices.unknown_nmi();
        }
    }

    fn flush_if_wanted(&self) {
        let wanted = self.flushes_wanted.load(Ordering::Acquire);
        if wanted != self.flushes_done.load(Ordering::Relaxed) {
            // SAFETY: in VMX operation, as the caller has seen.
            let flushed = unsafe { invept(InvEpt::AllContexts) };
            flushed.expect("INVEPT all-context is a required capability");
            // An NMI may have come in between and done more.
            self.flushes_done.fetch_max(wanted, Ordering::Release);
        }
    }
}

/// The CPU that executes.
pub fn this() -> &'static PerCpu {
    let address: u64;
    // SAFETY: GS points to a `PerCpu`, which starts with its own address, from `install` on.
    unsafe {
        asm!("mov {}, gs:[0]", out(reg) address, options(nostack, preserves_flags, readonly));
        &*(address as *const PerCpu)
    }
}

/// The same for handlers that may come too early for [`this`].
pub fn try_this() -> Option<&'static PerCpu> {
    (GsBase::read().as_u64() != 0).then(this)
}

/// Now and here, for an event.
pub fn stamp() -> Stamp {
    try_this().map_or(Stamp { tsc: now(), cpu: 0, seq: 0 }, PerCpu::stamp)
}

/// The CPU with this index, if it has come online.
pub fn get(index: u32) -> Option<&'static PerCpu> {
    CPUS.get(index as usize)?.get().copied()
}

/// The CPUs in a set.
pub fn all(set: u64) -> impl Iterator<Item = &'static PerCpu> {
    (0..MAX_CPUS as u32).filter(move |index| set & 1 << index != 0).filter_map(get)
}

/// The first CPU of a set after the one with this index, around.
pub fn next(set: u64, after: u32) -> Option<&'static PerCpu> {
    let ahead = set.rotate_right(after + 1);
    if ahead == 0 { None } else { get((after + 1 + ahead.trailing_zeros()) % MAX_CPUS as u32) }
}

/// Those that are online.
pub fn online() -> u64 {
    ONLINE.load(Ordering::SeqCst)
}

/// NMIs of all CPUs so far.
pub fn nmis() -> u64 {
    all(u64::MAX).map(|cpu| cpu.nmis.load(Ordering::Relaxed)).sum()
}

/// Those of them that nobody here has sent.
pub fn unknown_nmis() -> u64 {
    all(u64::MAX).map(|cpu| cpu.notices.unknown_nmis.load(Ordering::Relaxed)).sum()
}

/// Has all CPUs of `set` drop their translations derived from EPT, and waits until they have: for
/// the time of an NMI each, whatever they do, since it is their NMI handlers that flush.
pub fn shoot_down(set: u64, own: LocalApic) {
    let targets = set & online();
    for cpu in all(targets) {
        cpu.flushes_wanted.fetch_add(1, Ordering::AcqRel);
        if cpu.index == this().index {
            cpu.flush_if_wanted();
        } else {
            cpu.kick(own);
        }
    }
    for cpu in all(targets) {
        let wanted = cpu.flushes_wanted.load(Ordering::Acquire);
        // One that goes offline meanwhile forgets everything by that.
        while cpu.flushes_done.load(Ordering::Acquire) < wanted && online() & cpu.bit() != 0 {
            core::hint::spin_loop();
        }
    }
}

/// CPUs that have stopped for good.
static STOPPED: AtomicU64 = AtomicU64::new(0);
/// How long a panic waits for them, in ticks of the TSC.
const STOP_WITHIN: u64 = 10_000_000;

/// Stops all other CPUs for good, for a panic: returns when they have, or do not answer.
pub fn stop_others(own: LocalApic) {
    let me = try_this().map_or(0, PerCpu::bit);
    let others = online() & !me;
    all(others).for_each(|cpu| cpu.kick(own));
    let start = now();
    while STOPPED.load(Ordering::SeqCst) & others != others
        && now().wrapping_sub(start) < STOP_WITHIN
    {
        core::hint::spin_loop();
    }
}

/// This CPU does nothing any more.
pub fn stop() -> ! {
    STOPPED.fetch_or(try_this().map_or(0, PerCpu::bit), Ordering::SeqCst);
    loop {
        interrupts::disable();
        hlt();
    }
}
