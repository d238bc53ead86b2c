// Types of validation layers' settings, for `c++ -include`: llama.cpp names them and uses none, and Vulkan's
// headers before 1.3.272 lack them. The loader reads the first two fields of the last.
#include <cstdint>

namespace vk {
enum class LayerSettingTypeEXT { eBool32 };
struct LayerSettingEXT { const char *layer, *name; LayerSettingTypeEXT type; uint32_t count; const void *values; };
struct LayerSettingsCreateInfoEXT {
    uint32_t sType = 1000496000;  // VK_STRUCTURE_TYPE_LAYER_SETTINGS_CREATE_INFO_EXT
    const void *pNext = nullptr, *nothing[2] = {};
    template <class Settings> LayerSettingsCreateInfoEXT(const Settings &) {}
};
}
