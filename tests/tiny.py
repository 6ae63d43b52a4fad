"A network for tests of all that is around a network: with it a whole run takes half as long as with timm's smallest"
from torch import nn

class Tiny(nn.Module):
    "Two convolutions with BatchNorm, and a head; its pictures are not normalised as ImageNet's usually are"
    pretrained_cfg = dict(input_size=(3,32,32), mean=3*(0.5,), std=3*(0.5,))
    def __init__(self, num_classes):
        super().__init__()
        self.conv1,self.bn1 = nn.Conv2d(3, 16, 3, 2, 1, bias=False),nn.BatchNorm2d(16)
        self.conv2,self.bn2 = nn.Conv2d(16, 32, 3, 2, 1, bias=False),nn.BatchNorm2d(32)
        self.fc = nn.Linear(32, num_classes)
    def forward(self, x):
        x = self.bn1(self.conv1(x)).relu()
        x = self.bn2(self.conv2(x)).relu()
        return self.fc(x.mean((2,3)))

def network(num_classes=1000): return Tiny(num_classes)
