//! A virtual machine: memory, devices, its vCPU, and what is counted of it.

use alloc::boxed::Box;
use alloc::string::{String, ToString};
use core::fmt;

use arrayvec::ArrayVec;
use raw_cpuid::CpuIdReaderNative;
use sld::{PolicyError, Task, Verdict, VmPolicy};
use vmx::addr::{GuestPhysAddr, HostPhysAddr};
use vmx::bitmap::{IO_ALL_EXIT, MsrBitmap};
use vmx::capability::Capabilities;
use vmx::controls::Secondary;
use vmx::cpuid::{CpuidTable, Offer};
use vmx::ept::{Ept, MapError, MemoryType, PageSize, Permissions};
use vmx::msr_policy;
use vmx::setup::Pointers;
use vmx::vcpu::{Vcpu, VcpuConfig};
use vmx::world::register;

use crate::config::VmConfig;
use crate::devices::Devices;
use crate::events::Object;
use crate::frames::FRAME;
use crate::guest_memory::GuestMemory;
use crate::memory::{self, Tables};
use crate::pvh::{self, ImageError};
use crate::ramdisk::Ramdisk;
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

/// Why a VM cannot be started. The others run.
#[derive(Debug)]
pub enum StartError {
    /// The ramdisk has no such file.
    NoImage(String),
    /// The image is of no use.
    Image(ImageError),
    /// The policy does not go with the host's mode.
    Policy(PolicyError),
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
            Self::Policy(error) => error.fmt(f),
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

/// Split locks of one VM, by what was done.
#[derive(Debug, Default, Clone, Copy)]
pub struct SplitLocks {
    /// #AC delivered to the guest: its own.
    pub inject: u64,
    /// Let pass.
    pub warn: u64,
    /// VM stopped.
    pub kill: u64,
}

impl SplitLocks {
    /// Adds another VM's.
    pub fn add(&mut self, other: &Self) {
        self.inject += other.inject;
        self.warn += other.warn;
        self.kill += other.kill;
    }

    /// Writes them as fields of an event.
    pub fn write(&self, json: &mut Object<'_>) -> fmt::Result {
        json.number("inject", self.inject)?;
        json.number("warn", self.warn)?;
        json.number("kill", self.kill)
    }
}

/// Guest-physical pages without memory that stand in for one instruction. A gather touches 16, and
/// 4 levels of page tables may lie there as well.
const MAX_HOLES: usize = 32;

/// What surrounds a VM's vCPU.
#[derive(Debug)]
pub struct Guest {
    /// The VM's name.
    pub name: &'static str,
    /// What it gets of split-lock detection.
    pub policy: VmPolicy,
    /// The task that its vCPU runs on.
    pub task: Task,
    /// Its memory.
    pub memory: GuestMemory,
    /// Its devices.
    pub devices: Devices,
    /// What was decided.
    pub split_locks: SplitLocks,
    /// How long it may still run, in ticks of the TSC.
    pub ticks_left: u64,
    /// How often the real bit was written on its account.
    pub real_bit_writes: u64,
    /// Always there until the VM is dropped.
    ept: Option<Ept>,
    holes: ArrayVec<GuestPhysAddr, MAX_HOLES>,
    /// What stands in for memory that is not there: all ones, whatever is written.
    stand_in: HostPhysAddr,
}

impl Guest {
    fn ept(&mut self) -> &mut Ept {
        self.ept.as_mut().expect("the tables are there until the VM is dropped")
    }

    /// Lets the stand-in page appear at `gpa` for one instruction, so that reads are all ones and
    /// writes go nowhere. False when there is no memory for tables, or the instruction touches
    /// more pages than any does.
    pub fn map_hole(&mut self, gpa: GuestPhysAddr) -> bool {
        let page = GuestPhysAddr::new_truncate(gpa.as_u64() & !(FRAME - 1));
        let stand_in = self.stand_in;
        let rwx = Permissions::all();
        !self.holes.is_full()
            && self
                .ept()
                .map(&mut Tables, page, stand_in, PageSize::Size4K, rwx, MemoryType::WriteBack)
                .is_ok()
            && self.holes.try_push(page).is_ok()
    }

    /// The instruction is over: nothing stands at its addresses any more.
    pub fn unmap_holes(&mut self) {
        while let Some(page) = self.holes.pop() {
            let stale = self.ept().unmap(&mut Tables, page);
            // SAFETY: an exit of this VM is being handled on the only CPU that runs it.
            unsafe { stale.invalidate() }.expect("INVEPT single-context is a required capability");
        }
        fill_stand_in(self.stand_in);
    }

    /// It has run, or waited for its timer, for so many ticks.
    pub fn charge(&mut self, ticks: u64) {
        // Without a limit there is nothing to count down.
        if self.ticks_left != u64::MAX {
            self.ticks_left = self.ticks_left.saturating_sub(ticks);
        }
    }

    /// Counts a verdict.
    pub fn count(&mut self, verdict: Verdict) {
        match verdict {
            Verdict::Inject => self.split_locks.inject += 1,
            Verdict::Warn { .. } => self.split_locks.warn += 1,
            Verdict::Step { .. } | Verdict::Kill | Verdict::KillBogus => self.split_locks.kill += 1,
        }
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        if let Some(ept) = self.ept.take() {
            // The frames may come back as another VM's tables, under the same EPT pointer.
            let stale = ept.destroy(&mut Tables);
            // SAFETY: the vCPU is put, on the only CPU that ever ran it.
            unsafe { stale.invalidate() }.expect("INVEPT single-context is a required capability");
        }
        memory::free_frame(self.stand_in);
    }
}

fn fill_stand_in(frame: HostPhysAddr) {
    // SAFETY: a frame of our own, which only the guest writes besides, between two exits.
    unsafe { memory::to_virtual::<u8>(frame).write_bytes(0xff, FRAME as usize) };
}

/// A virtual machine.
#[derive(Debug)]
pub struct Vm {
    /// Its vCPU; apart from the rest, since both are in use while it runs.
    pub vcpu: Box<Vcpu>,
    /// The rest.
    pub guest: Guest,
    region: HostPhysAddr,
}

/// What VMs are made with.
pub struct Factory<'a> {
    /// The CPU's capabilities.
    pub caps: &'a Capabilities,
    /// Shared bitmaps.
    pub bitmaps: Bitmaps,
    /// The images.
    pub ramdisk: Ramdisk<'a>,
    /// The host's split-lock detection.
    pub host: sld::Host,
}

impl Factory<'_> {
    /// Makes the VM with this index (below [`crate::config::MAX_VMS`]).
    ///
    /// # Errors
    ///
    /// [`StartError`]; nothing is left behind.
    pub fn build(&self, config: &VmConfig, index: u16) -> Result<Vm, StartError> {
        let policy = VmPolicy::new(self.host, config.policy, config.expose_sld)
            .map_err(StartError::Policy)?;
        let image = self
            .ramdisk
            .file(&config.image)
            .ok_or_else(|| StartError::NoImage(config.image.clone()))?;
        let wanted = config.memory_mib << 20;
        let short = || StartError::OutOfMemory { wanted, free: memory::free_bytes() };
        // Compared first: to zero memory only to find that it is not enough takes time.
        if wanted > memory::free_bytes() {
            return Err(short());
        }
        let mut guest_memory = GuestMemory::new(wanted).ok_or_else(short)?;
        let entry =
            pvh::load(&mut guest_memory, image, &config.cmdline).map_err(StartError::Image)?;
        let stand_in = memory::allocate_frame().ok_or_else(short)?;
        fill_stand_in(stand_in);
        let name: &'static str = Box::leak(config.name.to_string().into_boxed_str());
        let ept = Ept::new(&mut Tables, self.caps.ept_accessed_dirty()).ok();
        // From here on `Drop` gives everything back.
        let mut guest = Guest {
            name,
            policy,
            task: Task::new(u32::from(index) + 1),
            memory: guest_memory,
            devices: Devices::new(name),
            split_locks: SplitLocks::default(),
            ticks_left: config.limit_ticks.unwrap_or(u64::MAX),
            real_bit_writes: 0,
            ept,
            holes: ArrayVec::new(),
            stand_in,
        };
        map_memory(&mut guest).map_err(|_| short())?;
        let region = vmcs_region(self.caps).ok_or_else(short)?;
        let offer = Offer {
            sld_exposed: policy.exposed(),
            rdtscp: self.caps.has_secondary(Secondary::ENABLE_RDTSCP),
            invpcid: self.caps.has_secondary(Secondary::ENABLE_INVPCID),
            apic_id: 0,
        };
        let pointers = Pointers {
            io_bitmap: self.bitmaps.io.as_u64(),
            msr_bitmap: self.bitmaps.msr.as_u64(),
            eptp: guest.ept().pointer(),
            vpid: index + 1,
        };
        // SAFETY: the region is a fresh frame with the revision identifier; the bitmaps live for
        // ever, the tables as long as the guest, which `Vm` drops after the vCPU is cleared.
        let mut vcpu = Box::new(unsafe {
            Vcpu::new(VcpuConfig {
                caps: *self.caps,
                region,
                pointers,
                cpuid: CpuidTable::new(&CpuIdReaderNative, offer),
                sld: sld::Vcpu::new(policy),
                apic_id: 0,
                rip: entry.rip,
                overrides: config.overrides(),
            })
        });
        vcpu.set_register(register::RBX, u64::from(entry.start_info));
        Ok(Vm { vcpu, guest, region })
    }
}

fn map_memory(guest: &mut Guest) -> Result<(), MapError> {
    let Guest { memory, ept, .. } = guest;
    let ept = ept.as_mut().ok_or(MapError::OutOfMemory)?;
    memory.frames().try_for_each(|(gpa, hpa)| {
        let rwx = Permissions::all();
        ept.map(&mut Tables, gpa, hpa, PageSize::Size2M, rwx, MemoryType::WriteBack)
    })
}

impl Vm {
    /// Ends the VM and gives its memory back.
    ///
    /// # Safety
    ///
    /// The vCPU is put, on the CPU that loaded it last, in VMX root operation.
    pub unsafe fn destroy(mut self) {
        // SAFETY: the caller's obligation.
        if let Err(fail) = unsafe { self.vcpu.clear() } {
            // The CPU may still write to the region: keep it.
            log::error!("VMCLEAR of {}: {fail}", self.guest.name);
            return;
        }
        memory::free_frame(self.region);
    }
}
