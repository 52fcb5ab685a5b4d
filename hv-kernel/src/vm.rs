//! A virtual machine: what its vCPUs share.

use alloc::boxed::Box;
use alloc::string::String;
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::fmt;
use core::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};

use arrayvec::ArrayVec;
use raw_cpuid::CpuIdReaderNative;
use sld::{PerSecond, Policy, PolicyError, RateLimiter, Source, VmPolicy};
use spin::{Mutex, Once};
use vmx::addr::{GuestPhysAddr, HostPhysAddr};
use vmx::bitmap::{IO_ALL_EXIT, MsrBitmap};
use vmx::capability::Capabilities;
use vmx::controls::Secondary;
use vmx::cpuid::{CpuidTable, Offer};
use vmx::ept::{Ept, MapError, MemoryType, PageSize, Permissions, TableMemory};
use vmx::mailbox::Mailbox;
use vmx::msr_policy;
use vmx::run::{End, PortWrite};
use vmx::setup::Pointers;
use vmx::vcpu::{Origin, Vcpu, VcpuConfig};
use vmx::world::register;

use crate::clock;
use crate::config::{Placement, PlacementError, VmConfig};
use crate::console::Console;
use crate::counters::Counters;
use crate::devices::Devices;
use crate::events::Ring;
use crate::fleet::{Last, Seat};
use crate::frames::FRAME;
use crate::gate::Gate;
use crate::guest_memory::GuestMemory;
use crate::memory::{self, Tables};
use crate::percpu;
use crate::pvh::{self, ImageError};
use crate::ramdisk::Ramdisk;
use crate::source::{Domains, Given, NotGiven};
use crate::task::VcpuTask;
use crate::wake::{Notify, Whereabouts};
use crate::x86::apic::LocalApic;
use crate::x86::cpu::vmcs_region;

/// Bitmaps that all VMs share, since all have the same policy.
#[derive(Debug, Clone, Copy)]
pub struct Bitmaps {
    msr: HostPhysAddr,
    io: HostPhysAddr,
}

impl Bitmaps {
    /// Fills two frames, which are never freed; `None` without memory.
    pub fn new() -> Option<Self> {
        let bitmaps = Self { msr: memory::allocate_frame()?, io: memory::allocate_frame()? };
        // SAFETY: frames of our own; a bitmap is one page.
        unsafe {
            memory::to_virtual::<MsrBitmap>(bitmaps.msr).write(msr_policy::bitmap());
            memory::to_virtual::<u8>(bitmaps.io).write_bytes(IO_ALL_EXIT, FRAME as usize);
        }
        Some(bitmaps)
    }
}

/// The most vCPUs that all VMs together have.
pub const MAX_VCPUS: usize = 192;
// What is allocated for them leaves the heap half empty.
const _: () = assert!(
    MAX_VCPUS * (size_of::<Vcpu>() + size_of::<VcpuTask>() + Ring::BYTES)
        <= memory::HEAP_BYTES as usize / 2
);

/// Why a VM cannot be started. The others run.
#[derive(Debug)]
pub enum StartError {
    /// The ramdisk has no such file.
    NoImage(String),
    /// The image is of no use.
    Image(ImageError),
    /// Its vCPUs cannot be as many, as important or where they are to be.
    Placement(PlacementError),
    /// Too many vCPUs of other VMs.
    TooManyVcpus,
    /// What it wants of split-lock detection is not to be had.
    Detection(NotGiven),
    /// Memory is short.
    OutOfMemory {
        /// What the VM is to have, in bytes.
        wanted: u64,
        /// What is free.
        free: u64,
    },
}

impl fmt::Display for StartError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoImage(path) => {
                write!(f, "the ramdisk has no file `{path}`: add it, or correct `image`")
            }
            Self::Image(error) => error.fmt(f),
            Self::Placement(error) => error.fmt(f),
            Self::TooManyVcpus => {
                write!(f, "all VMs together have {MAX_VCPUS} vCPUs at most; run fewer")
            }
            Self::Detection(error) => error.fmt(f),
            Self::OutOfMemory { wanted, free } => write!(
                f,
                "too little memory: the VM is to have {} MiB, {} MiB are free; lower its \
                 memory_mib, run fewer VMs, or give the machine more",
                wanted >> 20,
                free >> 20,
            ),
        }
    }
}

/// Why a VM's policy cannot be changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unchangeable {
    /// Its split locks are not detected.
    Undetected,
    /// The host's mode does not allow it.
    Policy(PolicyError),
}

impl From<PolicyError> for Unchangeable {
    fn from(error: PolicyError) -> Self {
        Self::Policy(error)
    }
}

impl fmt::Display for Unchangeable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Undetected => f.write_str(
                "its split locks are not detected (source none): give it another source in hv.toml",
            ),
            Self::Policy(error) => error.fmt(f),
        }
    }
}

/// Why a VM is over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reason {
    /// The guest loop of one of its vCPUs has ended it.
    End(End),
    /// All its vCPUs have executed HLT or wait for SIPI, and nothing could ever wake them.
    Halt,
    /// The `limit_ticks` of a vCPU are used up.
    TimeLimit,
    /// The `stop_after_loads` of the run are reached.
    LoadLimit,
    /// An operator has ended it.
    Stopped,
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::End(end) => end.fmt(f),
            Self::Halt => f.write_str("halt"),
            Self::TimeLimit => f.write_str("time limit"),
            Self::LoadLimit => f.write_str("load limit"),
            Self::Stopped => f.write_str("stopped"),
        }
    }
}

/// Guest-physical pages without memory that stand in for one instruction. A gather touches 16, and
/// 4 levels of page tables may lie there as well.
const MAX_HOLES: usize = 32;
/// Frames for the tables that these need: three for a page by itself.
const HOLE_TABLES: usize = 48;

/// How long the gate stays open after it was closed to somebody, in ticks of the TSC: a vCPU that
/// does nothing but reach for memory that is not there must not keep the others from running.
const QUIET_TICKS: u64 = 20_000;

/// Where a VM's memory appears, apart from the memory itself.
#[derive(Debug)]
struct Space {
    ept: Ept,
    holes: ArrayVec<GuestPhysAddr, MAX_HOLES>,
    /// Set aside when the VM is made: what a guest does takes nothing from others.
    spare: Spare,
}

/// Frames for tables.
#[derive(Debug)]
struct Spare(ArrayVec<HostPhysAddr, HOLE_TABLES>);

impl TableMemory for Spare {
    fn allocate(&mut self) -> Option<HostPhysAddr> {
        let frame = self.0.pop()?;
        // SAFETY: a whole frame of our own.
        unsafe { memory::to_virtual::<u8>(frame).write_bytes(0, FRAME as usize) };
        Some(frame)
    }

    fn free(&mut self, table: HostPhysAddr) {
        // `unmap` gives back what `map` has taken from here.
        self.0.push(table);
    }

    fn read(&self, table: HostPhysAddr, index: usize) -> u64 {
        Tables.read(table, index)
    }

    fn write(&mut self, table: HostPhysAddr, index: usize, entry: u64) {
        Tables.write(table, index, entry);
    }
}

/// What others use of a vCPU.
pub struct Slot {
    /// What is posted to it.
    pub mailbox: Mailbox,
    /// Where it is.
    pub whereabouts: Whereabouts,
    /// It is parked, and no timer will wake it: it does not count as awake.
    asleep: AtomicBool,
    /// Its number among all vCPUs.
    id: u16,
    /// The last change of the VM's policy that is in force for it.
    policy_change: AtomicU32,
    /// What it had counted when it was asked last, once it has answered.
    pub inspected: Mutex<Option<Inspected>>,
}

/// A vCPU's answer to [`Mailbox::post_inspect`].
#[derive(Debug, Clone)]
pub struct Inspected {
    /// The CPU that it was on.
    pub cpu: u32,
    /// What it had counted.
    pub counters: Counters,
}

/// A virtual machine. It ends when all its vCPUs have been retired and nobody refers to it.
pub struct Vm {
    /// Its name.
    pub name: &'static str,
    /// Where its split locks are detected.
    pub source: Source,
    /// What it gets of split-lock detection, and how often that was changed.
    policy: Mutex<(VmPolicy, u32)>,
    /// How many vCPUs, how important, and on which CPUs.
    pub placement: Placement,
    /// Its memory.
    pub memory: GuestMemory,
    /// Its devices.
    pub devices: Mutex<Devices>,
    /// Lines of output wait to be printed. Changed with the devices locked.
    has_lines: AtomicBool,
    /// Holds vCPUs out of the guest. Members are vCPUs.
    pub gate: Gate,
    /// Its vCPUs, as others see them.
    pub vcpus: Vec<Slot>,
    /// Why it is over, once it is.
    over: Once<Reason>,
    /// vCPUs that are not retired.
    left: AtomicU32,
    /// vCPUs that could do something without another one's help.
    awake: AtomicU32,
    /// CPUs that may know translations of its memory.
    used_by: AtomicU64,
    /// When its vCPUs have locked the bus, for policies that limit that.
    limiter: Box<Mutex<RateLimiter>>,
    /// Until then (TSC) nobody closes the gate again.
    quiet_until: AtomicU64,
    /// What its retired vCPUs have counted.
    counters: Mutex<Counters>,
    space: Mutex<Option<Space>>,
    /// What stands in for memory that is not there: all ones, whatever is written.
    stand_in: HostPhysAddr,
    /// Dropped after all else: then another VM may take its place.
    seat: Seat,
}

impl Vm {
    /// Lets the stand-in page appear at `gpa` for one instruction, so that reads are all ones and
    /// writes go nowhere. The caller holds the gate. False when there are no frames for tables, or
    /// the instruction touches more pages than any does.
    pub fn map_hole(&self, gpa: GuestPhysAddr) -> bool {
        let page = GuestPhysAddr::new_truncate(gpa.as_u64() & !(FRAME - 1));
        let mut space = self.space.lock();
        let Some(Space { ept, holes, spare }) = space.as_mut() else { return false };
        let rwx = Permissions::all();
        let kind = MemoryType::WriteBack;
        !holes.is_full()
            && ept.map(spare, page, self.stand_in, PageSize::Size4K, rwx, kind).is_ok()
            && holes.try_push(page).is_ok()
    }

    /// The instruction is over: nothing stands at its addresses any more. The caller still holds
    /// the gate, so no other CPU has ever known these translations.
    pub fn unmap_holes(&self) {
        if let Some(Space { ept, holes, spare }) = self.space.lock().as_mut() {
            while let Some(page) = holes.pop() {
                let stale = ept.unmap(spare, page);
                // SAFETY: an exit of this VM is being handled, in VMX root operation; the other
                // vCPUs were held out of the guest meanwhile.
                let dropped = unsafe { stale.invalidate() };
                dropped.expect("INVEPT single-context is a required capability");
            }
        }
        fill_stand_in(self.stand_in);
    }

    /// What it gets of split-lock detection.
    pub fn policy(&self) -> VmPolicy {
        self.policy.lock().0
    }

    /// Changes its policy. Its vCPUs are to be told: [`Mailbox::post_policy`].
    ///
    /// # Errors
    ///
    /// [`Unchangeable`]; nothing has changed.
    pub fn set_policy(&self, policy: Policy) -> Result<(), Unchangeable> {
        if self.source == Source::None {
            return Err(Unchangeable::Undetected);
        }
        let mut current = self.policy.lock();
        *current = (current.0.with(policy)?, current.1 + 1);
        Ok(())
    }

    /// The policy that this vCPU was told of last is in force for it.
    pub fn policy_taken(&self, vcpu: u32, policy: Policy) {
        let (current, change) = *self.policy.lock();
        // One that has changed again meanwhile is told of again.
        if current.policy() == policy {
            self.vcpus[vcpu as usize].policy_change.store(change, Ordering::Release);
        }
    }

    /// Whether its policy is in force for all its vCPUs.
    pub fn is_policy_in_force(&self) -> bool {
        let (_, change) = *self.policy.lock();
        self.vcpus.iter().all(|slot| slot.policy_change.load(Ordering::Acquire) == change)
    }

    /// It has ended like this.
    pub fn set_last(&self, last: Last) {
        self.seat.set_last(last);
    }

    /// Until when the gate must not be closed; `None` if it may be closed now.
    pub fn quiet_until(&self, now: u64) -> Option<u64> {
        Some(self.quiet_until.load(Ordering::Relaxed)).filter(|until| *until > now)
    }

    /// The gate has been closed for memory that is not there: the others have some time to
    /// themselves.
    pub fn keep_quiet(&self, now: u64) {
        if self.vcpus.len() > 1 {
            self.quiet_until.store(now.saturating_add(QUIET_TICKS), Ordering::Relaxed);
        }
    }

    /// Whether a vCPU may lock the bus now; if not, not before the time returned.
    pub fn may_split(&self, now: u64, limit: PerSecond) -> Result<(), u64> {
        self.limiter.lock().allow(now, limit)
    }

    /// `cpu` is going to run one of the vCPUs.
    #[inline]
    pub fn used_by(&self, cpu: u64) {
        if self.used_by.load(Ordering::Relaxed) & cpu == 0 {
            self.used_by.fetch_or(cpu, Ordering::Relaxed);
        }
    }

    /// IN from a port of a device.
    #[inline(never)]
    pub fn port_read(&self, port: u16, size: u8) -> u32 {
        self.devices.lock().port_read(port, size)
    }

    /// OUT to a port of a device.
    #[inline(never)]
    pub fn port_write(&self, port: u16, size: u8, value: u32) -> PortWrite {
        let mut devices = self.devices.lock();
        let done = devices.port_write(port, size, value);
        self.has_lines.store(devices.has_lines(), Ordering::Relaxed);
        done
    }

    /// Whether output waits to be printed.
    #[inline]
    pub fn has_lines(&self) -> bool {
        self.has_lines.load(Ordering::Relaxed)
    }

    /// The VM has ended: so has its last line of output.
    pub fn end_line(&self) {
        let mut devices = self.devices.lock();
        devices.end_line();
        self.has_lines.store(devices.has_lines(), Ordering::Relaxed);
    }

    /// Prints the next line of output that waits; false if there is none.
    pub fn print_line(&self, console: &mut Console) -> bool {
        let mut devices = self.devices.lock();
        let line = devices.next_line();
        self.has_lines.store(devices.has_lines(), Ordering::Relaxed);
        drop(devices);
        let Some(line) = line else { return false };
        // What is kept of a line is ASCII.
        console.guest(self.name, core::str::from_utf8(&line).unwrap_or(""));
        true
    }

    /// Whether it is over.
    pub fn is_over(&self) -> bool {
        self.over.is_completed()
    }

    /// Why it is over.
    pub fn reason(&self) -> Option<Reason> {
        self.over.get().copied()
    }

    /// Ends it; the first reason counts. Its vCPUs are to be told: [`Mailbox::post_end`].
    pub fn end(&self, reason: Reason) {
        self.over.call_once(|| reason);
    }

    /// Whom to kick or wake now that something was posted to the vCPU. A vCPU that is woken counts
    /// as awake again, before its waker can fall asleep.
    pub fn notify(&self, slot: &Slot) -> Option<(u32, Option<u16>)> {
        match slot.whereabouts.notify() {
            Notify::Nothing => None,
            Notify::Kick(cpu) => Some((cpu, None)),
            Notify::Wake(cpu) => {
                if slot.asleep.swap(false, Ordering::SeqCst) {
                    self.awake.fetch_add(1, Ordering::SeqCst);
                }
                Some((cpu, Some(slot.id)))
            }
        }
    }

    /// Parks the vCPU on `cpu`, unless something was posted to it: then it is false. `forever`: it
    /// has no timer that will wake it. The VM is over if that goes for all of them.
    pub fn park(&self, vcpu: u32, cpu: u32, forever: bool) -> bool {
        let slot = &self.vcpus[vcpu as usize];
        slot.asleep.store(forever, Ordering::SeqCst);
        slot.whereabouts.set_parked(cpu);
        if !slot.mailbox.is_empty() && slot.whereabouts.unpark(cpu) {
            return false;
        }
        // Who has woken it meanwhile has counted it, or is about to, and is awake until then.
        if forever && self.awake.fetch_sub(1, Ordering::SeqCst) == 1 {
            self.end(Reason::Halt);
            // Nobody else is there to be told; the vCPU itself is told by the caller.
        }
        true
    }

    /// One more vCPU is retired, and has counted this. The sum over all of them, if it was the last.
    pub fn retire(&self, counters: &Counters) -> Option<Counters> {
        let mut sum = self.counters.lock();
        sum.add(counters);
        (self.left.fetch_sub(1, Ordering::AcqRel) == 1).then(|| sum.clone())
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        if let Some(Space { ept, spare, .. }) = self.space.get_mut().take() {
            // The frames come back as something else: no CPU may know them as this VM's memory.
            percpu::shoot_down(*self.used_by.get_mut(), LocalApic::current());
            ept.destroy(&mut Tables).held_by_none();
            spare.0.into_iter().for_each(memory::free_frame);
        }
        memory::free_frame(self.stand_in);
    }
}

fn fill_stand_in(frame: HostPhysAddr) {
    // SAFETY: a frame of our own, which only the guest writes besides, between two exits.
    unsafe { memory::to_virtual::<u8>(frame).write_bytes(0xff, FRAME as usize) };
}

/// What VMs are made with.
pub struct Factory<'a> {
    /// The CPUs' capabilities.
    pub caps: &'a Capabilities,
    /// Shared bitmaps.
    pub bitmaps: Bitmaps,
    /// The images.
    pub ramdisk: Ramdisk<'a>,
    /// Split-lock detection for VMs.
    pub domains: Domains,
}

/// A VM that is about to be made: its memory is taken and zeroed bit by bit, so that nobody waits for all
/// of it at once.
pub struct Plan {
    placement: Placement,
    given: Given,
    /// The numbers of its vCPUs: the first, and the one after the last.
    ids: (u16, u16),
    memory: GuestMemory,
    wanted: u64,
}

impl Plan {
    /// Takes more memory, 2 MiB at most. True once there is all of it.
    ///
    /// # Errors
    ///
    /// [`StartError::OutOfMemory`].
    pub fn fill(&mut self) -> Result<bool, StartError> {
        if self.memory.len() < self.wanted {
            self.memory.grow().ok_or_else(|| short(self.wanted))?;
        }
        Ok(self.memory.len() >= self.wanted)
    }
}

fn short(wanted: u64) -> StartError {
    StartError::OutOfMemory { wanted, free: memory::free_bytes() }
}

impl Factory<'_> {
    /// Checks whether the VM can be made. Its vCPUs get the numbers from `first` on.
    ///
    /// # Errors
    ///
    /// [`StartError`].
    pub fn plan(&self, config: &VmConfig, first: usize) -> Result<Plan, StartError> {
        let placement = config.placement(percpu::online()).map_err(StartError::Placement)?;
        let end = first + placement.vcpus as usize;
        // VPIDs are numbers plus 1.
        let ids = u16::try_from(first).ok().zip(u16::try_from(end).ok());
        let ids = ids.filter(|_| end <= MAX_VCPUS).ok_or(StartError::TooManyVcpus)?;
        let given = self.domains.give(config, self.caps).map_err(StartError::Detection)?;
        self.image(config)?;
        let wanted = config.memory_mib << 20;
        // Compared first: to zero memory only to find that it is not enough takes time.
        if wanted > memory::free_bytes() {
            return Err(short(wanted));
        }
        let memory = GuestMemory::with_room_for(wanted);
        Ok(Plan { placement, given, ids, memory, wanted })
    }

    fn image(&self, config: &VmConfig) -> Result<&[u8], StartError> {
        let image = self.ramdisk.file(&config.image);
        image.ok_or_else(|| StartError::NoImage(config.image.clone()))
    }

    /// Makes a VM of a plan for `config` that has all its memory.
    ///
    /// # Errors
    ///
    /// [`StartError`]; nothing is left behind.
    pub fn build(
        &self,
        config: &'static VmConfig,
        plan: Plan,
        seat: Seat,
    ) -> Result<(Arc<Vm>, Vec<VcpuTask>), StartError> {
        let Plan { placement, given, ids: (first, end), memory: mut guest_memory, wanted } = plan;
        let Given { source, policy, aside } = given;
        let count = placement.vcpus;
        let short = || short(wanted);
        let entry = pvh::load(&mut guest_memory, self.image(config)?, &config.cmdline)
            .map_err(StartError::Image)?;
        let stand_in = memory::allocate_frame().ok_or_else(short)?;
        fill_stand_in(stand_in);
        let ept = Ept::new(&mut Tables, self.caps.ept_accessed_dirty()).ok();
        let empty = || Spare(ArrayVec::new());
        let space = ept.map(|ept| Space { ept, holes: ArrayVec::new(), spare: empty() });
        // From here on `Drop` gives everything back.
        let mut vm = Vm {
            name: &config.name,
            source,
            policy: Mutex::new((policy, 0)),
            placement,
            memory: guest_memory,
            devices: Mutex::new(Devices::new()),
            has_lines: AtomicBool::new(false),
            gate: Gate::new(),
            vcpus: (first..end)
                .map(|id| Slot {
                    mailbox: Mailbox::new(),
                    whereabouts: Whereabouts::new(),
                    asleep: AtomicBool::new(false),
                    id,
                    policy_change: AtomicU32::new(0),
                    inspected: Mutex::new(None),
                })
                .collect(),
            over: Once::new(),
            left: AtomicU32::new(count),
            awake: AtomicU32::new(count),
            used_by: AtomicU64::new(0),
            limiter: Box::new(Mutex::new(RateLimiter::new(clock::ticks_per_second()))),
            quiet_until: AtomicU64::new(0),
            counters: Mutex::new(Counters::new()),
            space: Mutex::new(space),
            stand_in,
            seat,
        };
        let eptp = vm.map_memory().map_err(|_| short())?;
        let vm = Arc::new(vm);
        let tasks = (0..count).zip(first..).map(|(index, id)| {
            let vcpu = self.vcpu(config, &vm, (index, id), entry, eptp).ok_or_else(short)?;
            let ticks = config.limit_ticks.unwrap_or(u64::MAX);
            Ok(VcpuTask::new(vm.clone(), index, id, vcpu, ticks, aside))
        });
        let tasks = tasks.collect::<Result<_, _>>()?;
        Ok((vm, tasks))
    }

    /// The vCPU with this index in the VM and this number among all.
    fn vcpu(
        &self,
        config: &VmConfig,
        vm: &Vm,
        (index, id): (u32, u16),
        entry: pvh::Entry,
        eptp: u64,
    ) -> Option<(Box<Vcpu>, HostPhysAddr)> {
        let region = vmcs_region(self.caps)?;
        let offer = Offer {
            sld_exposed: vm.policy().exposed(),
            rdtscp: self.caps.has_secondary(Secondary::ENABLE_RDTSCP),
            invpcid: self.caps.has_secondary(Secondary::ENABLE_INVPCID),
            apic_id: index,
            vcpus: vm.placement.vcpus,
        };
        let pointers = Pointers {
            io_bitmap: self.bitmaps.io.as_u64(),
            msr_bitmap: self.bitmaps.msr.as_u64(),
            eptp,
            vpid: id + 1,
        };
        let starts = index == 0;
        // SAFETY: the region is a fresh frame with the revision identifier; the bitmaps live for
        // ever, the tables as long as the VM, to which the vCPU's task refers until the vCPU is
        // cleared.
        let mut vcpu = Box::new(unsafe {
            Vcpu::new(VcpuConfig {
                caps: *self.caps,
                region,
                pointers,
                cpuid: CpuidTable::new(&CpuIdReaderNative, offer),
                sld: sld::Vcpu::new(vm.policy()),
                source: vm.source,
                apic_id: index,
                origin: if starts {
                    Origin::Protected { rip: entry.rip }
                } else {
                    Origin::WaitForSipi
                },
                overrides: if starts { config.overrides() } else { Default::default() },
            })
        });
        if starts {
            vcpu.set_register(register::RBX, u64::from(entry.start_info));
        }
        Some((vcpu, region))
    }
}

impl Vm {
    /// Maps all memory and sets frames aside for holes. The EPT pointer.
    fn map_memory(&mut self) -> Result<u64, MapError> {
        let space = self.space.get_mut().as_mut().ok_or(MapError::OutOfMemory)?;
        self.memory.frames().try_for_each(|(gpa, hpa)| {
            let rwx = Permissions::all();
            let kind = MemoryType::WriteBack;
            space.ept.map(&mut Tables, gpa, hpa, PageSize::Size2M, rwx, kind)
        })?;
        while !space.spare.0.is_full() {
            space.spare.0.push(memory::allocate_frame().ok_or(MapError::OutOfMemory)?);
        }
        Ok(space.ept.pointer())
    }
}
