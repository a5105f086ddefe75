//! Opening devices over a tree that stands in for the host's: what is said when something is missing, and
//! which way is chosen. What only a kernel can refuse is tested in the virtual machine.

#![allow(clippy::unwrap_used, reason = "a test fails where it must")]

use airlift_vfio::{DeviceAddress, OpenError, OpenOptions, Roots, Way, list, open};
use std::fs;
use std::os::fd::AsRawFd;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

const BDF: &str = "0000:65:00.2";
const UUID: &str = "00000000-0000-0000-0000-00000000000a";

struct Host {
    root: tempfile::TempDir,
}

impl Host {
    /// A host whose kernel says in sysfs what VFIO holds.
    fn new() -> Self {
        let host = Self { root: tempfile::tempdir().unwrap() };
        for directory in
            ["sys/bus/pci/devices", "sys/bus/mdev/devices", "sys/class/vfio-dev", "dev/vfio", "proc"]
        {
            fs::create_dir_all(host.path(directory)).unwrap();
        }
        host
    }

    fn path(&self, path: &str) -> PathBuf {
        self.root.path().join(path)
    }

    fn link(&self, to: &str, at: &str) {
        fs::create_dir_all(self.path(to)).unwrap();
        fs::create_dir_all(self.path(at).parent().unwrap()).unwrap();
        symlink(self.path(to), self.path(at)).unwrap();
    }

    fn device(&self, bus: &str, name: &str, driver: Option<&str>) -> String {
        let device = format!("sys/devices/{name}");
        self.link(&device, &format!("sys/bus/{bus}/devices/{name}"));
        self.link(&format!("sys/bus/{bus}"), &format!("{device}/subsystem"));
        if let Some(driver) = driver {
            self.link(&format!("sys/bus/{bus}/drivers/{driver}"), &format!("{device}/driver"));
        }
        device
    }

    fn group(&self, device: &str, number: u32) {
        self.link(&format!("sys/kernel/iommu_groups/{number}"), &format!("{device}/iommu_group"));
        let name = Path::new(device).file_name().unwrap().to_str().unwrap();
        self.link(device, &format!("sys/kernel/iommu_groups/{number}/devices/{name}"));
    }

    /// VFIO holds it, and gives it a character device where `cdev`.
    fn held(&self, device: &str, node: &str, cdev: bool) {
        let directory = format!("{device}/vfio-dev/{node}");
        fs::create_dir_all(self.path(&directory)).unwrap();
        if cdev {
            fs::write(self.path(&directory).join("dev"), "1:3\n").unwrap();
        }
        self.link(device, &format!("{directory}/device"));
        self.link(&directory, &format!("sys/class/vfio-dev/{node}"));
    }

    fn options(&self, way: Way) -> OpenOptions {
        let roots = Roots { sys: self.path("sys"), dev: self.path("dev"), proc: self.path("proc") };
        OpenOptions { way, roots, ..OpenOptions::default() }
    }

    fn error(&self, address: &str, way: Way) -> OpenError {
        let address: DeviceAddress = address.parse().unwrap();
        let error = open(&address, &self.options(way)).expect_err("there is no kernel behind the tree");
        assert!(!error.advice().is_empty());
        error
    }
}

fn pci() -> String {
    format!("pci:{BDF}")
}

#[test]
fn a_device_that_is_not_there_is_named_with_what_is_missing() {
    let host = Host::new();
    let error = host.error(&pci(), Way::Auto);
    assert!(matches!(&error, OpenError::NotFound { missing, .. } if missing.ends_with(BDF)), "{error}");
    fs::remove_dir_all(host.path("sys/bus/mdev")).unwrap();
    let error = host.error(&format!("mdev:{UUID}"), Way::Auto);
    assert!(
        matches!(&error, OpenError::NotFound { missing, .. } if missing.ends_with("bus/mdev")),
        "{error}"
    );
    let error = host.error("cdev:/nowhere/vfio0", Way::Auto);
    assert!(matches!(error, OpenError::NotFound { .. }), "{error}");
}

#[test]
fn a_device_without_a_driver_of_vfio_is_refused_with_the_driver() {
    let host = Host::new();
    host.device("pci", BDF, None);
    assert_eq!(host.error(&pci(), Way::Auto), OpenError::NoDriver { name: BDF.into() });
    let host = Host::new();
    host.device("pci", BDF, Some("e1000e"));
    let error = host.error(&pci(), Way::Auto);
    assert_eq!(error, OpenError::WrongDriver { name: BDF.into(), driver: "e1000e".into() });
    assert!(error.advice().contains("vfio-pci") && error.advice().contains(BDF));
}

#[test]
fn an_iommu_that_is_missing_or_only_pretended_is_said() {
    let host = Host::new();
    let device = host.device("pci", BDF, Some("vfio-pci"));
    host.held(&device, "vfio0", false);
    let noiommu = |noiommu| OpenError::NoIommu { name: BDF.into(), noiommu };
    assert_eq!(host.error(&pci(), Way::Group), noiommu(false));
    let host = Host::new();
    let device = host.device("pci", BDF, Some("vfio-pci"));
    host.held(&device, "noiommu-vfio0", true);
    assert_eq!(host.error(&pci(), Way::Cdev), noiommu(true));
}

#[test]
fn a_host_without_vfio_and_a_kernel_without_character_devices_are_told_apart() {
    let host = Host::new();
    let device = host.device("pci", BDF, Some("vfio-pci"));
    host.group(&device, 12);
    host.held(&device, "vfio0", false);
    assert_eq!(host.error(&pci(), Way::Cdev), OpenError::NoCdev { name: BDF.into() });
    let missing = |error: OpenError, node: &str| {
        assert!(matches!(&error, OpenError::NoVfio { path, .. } if path.ends_with(node)), "{error}");
    };
    missing(host.error(&pci(), Way::Auto), "vfio/vfio");
    let host = Host::new();
    let device = host.device("mdev", UUID, Some("mtty"));
    host.held(&device, "vfio0", true);
    missing(host.error(&format!("mdev:{UUID}"), Way::Cdev), "dev/iommu");
}

// K-BIND
#[test]
fn the_character_device_is_taken_where_the_host_has_iommufd_and_the_group_otherwise() {
    let host = Host::new();
    let device = host.device("pci", BDF, Some("vfio-pci"));
    host.group(&device, 12);
    host.held(&device, "vfio0", true);
    // The first node that each way needs, as a file that is no such node.
    fs::write(host.path("dev/vfio/vfio"), "").unwrap();
    let tried = |host: &Host| match host.error(&pci(), Way::Auto) {
        OpenError::NotVfio { wanted, .. } => wanted,
        other => panic!("{other}"),
    };
    assert_eq!(tried(&host), "container");
    fs::write(host.path("dev/iommu"), "").unwrap();
    assert_eq!(tried(&host), "iommufd");
}

#[test]
fn a_descriptor_that_is_closed_or_of_something_else_is_refused() {
    let host = Host::new();
    let file = fs::File::open("/dev/null").unwrap();
    let fd = file.as_raw_fd();
    let error = host.error(&format!("fd:{fd}"), Way::Auto);
    assert!(matches!(error, OpenError::NotVfio { .. }), "{error}");
    // Above any limit of descriptors.
    let error = host.error("fd:2147483647", Way::Auto);
    assert_eq!(error, OpenError::NotOpen { fd: i32::MAX });
    // A node that sysfs does not know as one of VFIO's.
    let error = host.error("cdev:/dev/null", Way::Auto);
    assert!(matches!(error, OpenError::NotVfio { .. }), "{error}");
}

#[test]
fn a_character_device_is_found_by_its_number_whatever_its_path() {
    let host = Host::new();
    let device = host.device("pci", BDF, Some("vfio-pci"));
    host.held(&device, "vfio7", true);
    host.link(&format!("{device}/vfio-dev/vfio7"), "sys/dev/char/1:3");
    // It is /dev/null, as far as this tree goes: it is found, and fails at the iommufd.
    let error = host.error("cdev:/dev/null", Way::Auto);
    assert!(matches!(&error, OpenError::NoVfio { path, .. } if path.ends_with("dev/iommu")), "{error}");
}

#[test]
fn the_list_has_what_vfio_holds_and_nothing_else() {
    let host = Host::new();
    let device = host.device("pci", BDF, Some("mlx5_vfio_pci"));
    host.group(&device, 12);
    host.held(&device, "vfio1", true);
    let mdev = host.device("mdev", UUID, Some("mtty"));
    host.link("sys/devices/parent/mdev_supported_types/mtty-2", &format!("{mdev}/mdev_type"));
    host.held(&mdev, "vfio0", false);
    host.device("pci", "0000:00:1f.0", Some("lpc_ich"));
    let check = |host: &Host| {
        let found = list(&host.options(Way::Auto).roots).unwrap();
        assert_eq!(found.iter().map(|d| d.name.as_str()).collect::<Vec<_>>(), [UUID, BDF]);
        assert_eq!(found[0].mdev_type.as_deref(), Some("mtty-2"));
        assert_eq!((found[0].iommu_group, found[1].iommu_group), (None, Some(12)));
        assert_eq!(found[1].driver.as_deref(), Some("mlx5_vfio_pci"));
        found[1].cdev.clone()
    };
    assert_eq!(check(&host).as_deref(), Some("vfio1"));
    // Kernels before 6.1 have no such class.
    for directory in ["sys/class/vfio-dev", &format!("{device}/vfio-dev"), &format!("{mdev}/vfio-dev")] {
        fs::remove_dir_all(host.path(directory)).unwrap();
    }
    assert_eq!(check(&host), None);
}
